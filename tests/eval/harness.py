"""A stand-in for EleutherAI's lm-eval where that is not installed: the interfaces that zero_shot uses, and three kinds of tasks.

It reads task files in lm-eval's format, as far as they name a JSON file and templates, asks the model for what each kind of task asks, and
computes lm-eval's figures: acc and acc_norm, word_perplexity, exact_match. Signatures take the names that zero_shot gives, and no others.
"""

from __future__ import annotations

import abc
import importlib.metadata
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
import yaml


class LM(abc.ABC):
    """Every request has `args`: (context, continuation), (text,) or (context, settings)."""

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...


@dataclass(frozen=True)
class Request:
    args: tuple[Any, ...]


class TaskManager:
    def __init__(self, include_path: str | None = None):
        texts = [path.read_text() for path in sorted(Path(include_path).glob("*.yaml"))] if include_path else []
        self.tasks = {task["task"]: task for task in map(yaml.safe_load, texts)}


@dataclass
class Harness:
    """Remembers what it was called with."""

    called: list[dict[str, Any]] = field(default_factory=list)

    def simple_evaluate(
        self,
        *,
        model: LM,
        tasks: list[str],
        num_fewshot: int | None,
        limit: int | None,
        log_samples: bool,
        bootstrap_iters: int,
        task_manager: TaskManager,
    ) -> dict[str, Any]:
        self.called.append({"tasks": tasks, "num_fewshot": num_fewshot, "limit": limit})
        assert isinstance(model, LM) and not log_samples and bootstrap_iters
        results, counts = {}, {}
        for name in tasks:
            task = task_manager.tasks[name]
            documents = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()][:limit]
            results[name] = {"alias": name, **KINDS[task["output_type"]](model, task, documents)}
            counts[name] = {"original": len(documents), "effective": len(documents)}
        return {"results": results, "versions": dict.fromkeys(tasks, 1), "n-shot": dict.fromkeys(tasks, num_fewshot or 0), "n-samples": counts}


def make_table(found: dict[str, Any]) -> str:
    return "\n".join(f"|{task}|{name}|{value}|" for task, figures in found["results"].items() for name, value in figures.items())


def choice(model: LM, task: dict[str, Any], documents: list[dict[str, Any]]) -> dict[str, float]:
    asked = [[Request((filled(task["doc_to_text"], document), f" {text}")) for text in document["choices"]] for document in documents]
    found = iter(model.loglikelihood([request for requests in asked for request in requests]))
    best, normed = 0, 0
    for document, requests in zip(documents, asked, strict=True):
        log_p = [next(found)[0] for _ in requests]
        per_letter = [value / len(text) for value, text in zip(log_p, document["choices"], strict=True)]
        best += log_p.index(max(log_p)) == document["answer"]
        normed += per_letter.index(max(per_letter)) == document["answer"]
    return {"acc,none": best / len(documents), "acc_norm,none": normed / len(documents)}


def rolling(model: LM, task: dict[str, Any], documents: list[dict[str, Any]]) -> dict[str, float]:
    texts = [filled(task["doc_to_target"], document) for document in documents]
    log_p = model.loglikelihood_rolling([Request((text,)) for text in texts])
    return {"word_perplexity,none": math.exp(-sum(log_p) / sum(len(text.split()) for text in texts))}


def written(model: LM, task: dict[str, Any], documents: list[dict[str, Any]]) -> dict[str, float]:
    texts = model.generate_until([Request((filled(task["doc_to_text"], document), task["generation_kwargs"])) for document in documents])
    right = [text == filled(task["doc_to_target"], document) for text, document in zip(texts, documents, strict=True)]
    return {"exact_match,none": sum(right) / len(documents)}


KINDS = {"multiple_choice": choice, "loglikelihood_rolling": rolling, "generate_until": written}


def filled(template: str, document: dict[str, Any]) -> str:
    return jinja2.Template(template).render(document)


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> Harness:
    """The modules that zero_shot imports, for the length of a test."""
    harness = Harness()
    parts = {
        "lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM}, "lm_eval.evaluator": {"simple_evaluate": harness.simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager}, "lm_eval.utils": {"make_table": make_table},
    }  # fmt: skip
    for name, held in parts.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "stub" if name == "lm_eval" else real(name))
    return harness
