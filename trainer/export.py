"""A student as a folder for others: weights, what they are, and a model card that says how to use them and where they come from.

    python -m trainer export runs/student --output exported [--checkpoint best]

    exported/  README.md  student.json  model.safetensors  tokenizer/     the card holds the recipe, the dataset's identity and root hash,
                                                                          the figures, and the 20 lines that load it without this project
The folder is a student as well: `eval` and `student.init_from` read it. An `ar` student keeps its Hugging Face config and tokenizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from noise.identity import identity_hash
from noise.seal import copy_tokenizer
from noise.storage import DatasetError, read_json, write_json, write_text
from trainer import checkpoint
from trainer.standalone import lines_of
from trainer.students import load_student, load_tensors, save_tensors
from trainer.students.base import Base

_OF_HUGGING_FACE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def run(arguments: list[str]) -> int:
    """The command. Raises ValueError for people."""
    parser = argparse.ArgumentParser(prog="python -m trainer export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="Folder of a trained student.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write; it must not exist, or be empty.")
    parser.add_argument("--checkpoint", default="", help="A kept checkpoint instead of the last weights: its step, or best (see keep_best).")
    settings = parser.parse_args(arguments)
    export(settings.student, settings.output, settings.checkpoint)
    print(f"{settings.output} holds the student and its card")
    return 0


def export(folder: Path, output: Path, which: str = "") -> None:
    """Write `output`, whole or not at all. Raises DatasetError where the student or the checkpoint is not there, ValueError where `output` is."""
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} exists and is not empty; name another folder")
    student = load_student(folder)
    step = int(student.recipe.get("optim", {}).get("steps", 0))
    weights: dict[str, Tensor] = student.own_state()
    if which:
        chosen = _checkpoint(folder, which, student)
        step, weights = checkpoint.step_of(chosen), _weights(chosen)
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if student.config.kind == "ar":
        for name in _OF_HUGGING_FACE:
            if (folder / name).exists():
                shutil.copy(folder / name, temporary / name)
    tokenizer = folder / "tokenizer"
    if tokenizer.is_dir():
        copy_tokenizer(tokenizer, temporary / "tokenizer")
    save_tensors(temporary / "model.safetensors", weights)
    about = read_json(folder / "student.json")
    provenance = about.get("provenance", {})
    provenance["dataset"] = Path(str(provenance.get("dataset", ""))).name  # where it lay is nobody's business
    write_json(temporary / "student.json", {**about, "provenance": provenance})
    write_text(temporary / "README.md", card(student, output.name, provenance, _figures(folder, step), step))
    if output.exists():
        output.rmdir()
    temporary.rename(output)


def _checkpoint(folder: Path, which: str, student: Base) -> Path:
    if which == "best":
        found = checkpoint.best(folder, student.figure_names[0])
        if found is None:
            raise DatasetError(f"{folder} has no checkpoint that was evaluated; train with keep_best, or name a step")
    else:
        standing = {str(checkpoint.step_of(path)): path for path in checkpoint.checkpoints(folder)}
        found = standing.get(which.lstrip("0"))
        if found is None:
            raise DatasetError(f"{folder} has no checkpoint {which}; it has {', '.join(standing) or 'none'}")
    checkpoint.check(found)
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    weights = load_tensors(folder / "model.safetensors")
    return weights | (load_tensors(folder / "average.safetensors") if (folder / "average.safetensors").exists() else {})


def _figures(folder: Path, step: int) -> dict[str, float]:
    """The last figures of each name that were logged up to a step."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    figures: dict[str, float] = {}
    for line in lines:
        if line["step"] <= step:
            figures |= {name: value for name, value in line.items() if name != "step"}
    return figures


def card(student: Base, name: str, provenance: dict[str, Any], figures: dict[str, float], step: int) -> str:
    """The model card, Markdown with a YAML header."""
    identity = provenance.get("identity", {})
    dataset, root_hash = provenance.get("dataset", ""), provenance.get("root_hash", "")
    header = {"library_name": "safetensors", "tags": ["gumbel-distillation", student.config.kind, f"noise:{student.noise.kind}"]}
    table = "\n".join(f"| {figure} | {value:.6g} |" for figure, value in sorted(figures.items()))
    warning = (
        "\nThis student sees the dataset's noise, which knows the text: held-out losses with it are no bound on the likelihood, and rank nothing.\n"
        if student.noise.informed
        else ""
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=True).strip()}
---

# {name}

A parallel text generator ({student.config.kind}, noise: {student.noise.kind}) of {student.vocab_size:,} tokens and rows of {student.block_length},
trained for {step:,} steps by offline Gumbel distillation (arXiv 2603.22216) from a dataset of noise, without its teacher.

## Load it

With `torch` and `safetensors` alone, in this folder:

```python
{lines_of(student)}
```

## Where it comes from

Dataset `{dataset}`, root hash `{root_hash}`, identity hash `{identity_hash(identity) if identity else ""}`.

```json
{json.dumps(identity, indent=1, sort_keys=True)}
```

## Recipe

```yaml
{yaml.safe_dump(student.recipe, sort_keys=False).strip()}
```

## Figures

Nats a token where they are losses; `train` is the mean since the line before.
{warning}
| figure | value |
|---|---|
{table}
"""
