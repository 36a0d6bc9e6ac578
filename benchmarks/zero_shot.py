"""Zero-shot questions about held-out text, where no hub is at hand: three tasks in lm-eval's format, and what students answer.

    pip install -e '.[zero-shot]'
    python -m benchmarks.zero_shot --heldout runs/demo/heldout --folder runs/demo/questions \\
        --students '[runs/demo/students/mdlm,runs/demo/students/mdlm-gumbel]'

    heldout_next    the beginning of a text, and which of four continuations is its own; the others are those of other texts. Chance: .25
    heldout_order   the same, where the others have the words of its own in another order. Chance: .25
    heldout_text    perplexity of these texts, a word

The questions are a function of the rows and of nothing else. Every student is scored by `python -m eval zero-shot`, whose answers are kept.
"""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from eval.causal import load_tokenizer
from eval.reconstruct import full_rows
from eval.zero_shot import ZeroShotConfig, zero_shot
from noise.storage import DatasetError, read_json
from trainer.data import NoiseDataset

NEXT, ORDER, TEXT = "heldout_next", "heldout_order", "heldout_text"
_BEFORE, _AFTER, _CHOICES = 2, 3, 4  # words of a beginning, at least; of a continuation; answers of a question

Question = dict[str, Any]


@dataclass
class Config:
    """Which text, and who answers."""

    heldout: str
    """Noise dataset of held-out rows, with its tokenizer/."""
    students: list[str]
    """Folders of students or causal LMs."""
    folder: str
    """Where the questions, the tasks and the answers are kept."""
    tokenizer: str = ""
    """Folder of the students' tokenizer; empty: tokenizer/ in the held-out dataset."""
    questions: int = 256
    """Of each task, at most."""
    draws: int = 32
    """As in `python -m eval zero-shot`."""
    seed: int = 1
    """Names masks and noise."""
    device: str = "auto"
    """auto: a GPU where there is one."""
    output: str = "benchmarks/results/zero_shot.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        if not self.students or self.questions < _CHOICES:
            raise ValueError(f"students is {self.students} and questions {self.questions}; give one or more, and at least {_CHOICES}")


def questions(texts: list[str], most: int) -> dict[str, list[Question]]:
    """Task -> [{context, choices, answer}] or [{text}]. A continuation begins with the blanks before it. Raises DatasetError for too little text."""
    cuts = {text: cut for text in texts if (cut := _cut(text)) is not None}
    usable = list(cuts.values())[:most]
    following, ordered = [], []
    for number, (context, own) in enumerate(usable):
        others = _others(own, [usable[(number + step) % len(usable)][1] for step in range(1, len(usable))])
        if len(others) < _CHOICES - 1:
            break
        following.append(_question(context, own, others, number))
        ordered.append(_question(context, own, _reordered(own, number), number))
    if not usable or len(following) < len(usable):
        raise DatasetError(
            f"{len(usable)} rows have more than {_BEFORE + _AFTER} words, of which {_AFTER} in a row differ; questions need {_CHOICES} such rows "
            "with continuations that differ: give more held-out text"
        )
    return {NEXT: following, ORDER: ordered, TEXT: [{"text": text} for text in list(cuts)[:most]]}


def _cut(text: str) -> tuple[str, str] | None:
    """(the beginning, the next words with the blanks before each); None for a text of too few words, or where the next are not all different."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    if len(words) < _BEFORE + _AFTER + 1:  # the last word may be cut off
        return None
    begin = max(_BEFORE, (len(words) - 1 - _AFTER) // 2)
    context, own = text[: words[begin - 1][1]], text[words[begin - 1][1] : words[begin + _AFTER - 1][1]]
    return (context, own) if len(set(own.split())) == _AFTER else None


def _others(own: str, after: list[str]) -> list[str]:
    """The first continuations of other words than its own, and than each other."""
    found = {tuple(own.split()): own}
    for other in after:
        found.setdefault(tuple(other.split()), other)
        if len(found) == _CHOICES:
            break
    return list(found.values())[1:]


def _question(context: str, own: str, others: list[str], number: int) -> Question:
    answer = number % _CHOICES
    return {"context": context, "choices": [*others[:answer], own, *others[answer:]], "answer": answer}


def _reordered(own: str, number: int) -> list[str]:
    """Other orders of its words, each once, with the blanks where they were."""
    words, blanks, rng = own.split(), re.findall(r"\s+", own), random.Random(number)
    found: list[list[str]] = [words]
    while len(found) < _CHOICES:
        order = rng.sample(words, len(words))
        if order not in found:
            found.append(order)
    return ["".join(blank + word for blank, word in zip(blanks, order, strict=True)) for order in found[1:]]


def write_tasks(folder: Path, found: dict[str, list[Question]]) -> None:
    """A JSONL and a task file of lm-eval for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, asked in found.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(question) + "\n" for question in asked))
        task: dict[str, Any] = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}}, "test_split": "test",
            "target_delimiter": "",
        }  # fmt: skip
        if name == TEXT:
            task |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
            task |= {"metric_list": [{"metric": "word_perplexity"}]}
        else:
            task |= {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "choices", "doc_to_target": "answer"}
            task |= {"metric_list": [{"metric": "acc"}]}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def run(config: Config) -> None:
    dataset, folder = NoiseDataset(config.heldout), Path(config.folder)
    tokenizer: Any = load_tokenizer(config.tokenizer or str(Path(dataset.folder) / "tokenizer"))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in full_rows(dataset, len(dataset))[:, 1:].tolist()]
    found = questions(texts, config.questions)
    write_tasks(folder / "tasks", found)
    figures = {}
    for student in config.students:
        asked = ZeroShotConfig(
            student, str(folder), ",".join(found), str(folder / "tasks"), config.draws, tokenizer=config.tokenizer, seed=config.seed,
            device=config.device,  # type: ignore[arg-type]
        )  # fmt: skip
        answered = read_json(zero_shot(asked))
        kept = {name: {key: value for key, value in answered["results"][name].items() if key != "alias"} for name in found}
        figures[student] = {"likelihood": answered["likelihood"], **kept}
    results.show(
        f"Zero-shot on held-out text, {len(found[NEXT])} questions", ["student", "next (chance .25)", "order (chance .25)", "perplexity a word"],
        [[name, *(share(one[task]) for task in (NEXT, ORDER)), f"{one[TEXT]['word_perplexity,none']:.1f}"] for name, one in figures.items()],
        "± is one standard error",
    )  # fmt: skip
    settings = {"heldout": config.heldout, "questions": len(found[NEXT]), "draws": config.draws, "seed": config.seed}
    results.write(Path(config.output), settings, {"students": figures})


def share(figures: dict[str, Any]) -> str:
    """A task's share of right answers, with its standard error."""
    return f"{figures['acc,none']:.3f} ± {figures['acc_stderr,none']:.3f}"


def main(arguments: list[str] | None = None) -> int:
    return results.command("zero_shot", __doc__ or "", Config, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
