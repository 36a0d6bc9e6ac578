"""A causal LM that computes what a small one does at the cost of a large one: what exact drafting saves can then be timed at a small scale.

    python -m benchmarks.wide_teacher --teacher runs/demo/teacher --parameters 110_000_000 --output runs/demo/teacher-wide
    python -m eval accept --teacher runs/demo/teacher-wide --tokenizer runs/demo/tokenizer --student '[...]' --output runs/demo/accept-wide

Every MLP gets hidden units whose outgoing weights are zero: they are read and multiplied like all others and change nothing, so the
distribution, hence every count of accepted tokens, is the small model's, and a forward costs what so many parameters cost. How much
of a real teacher's text a drafter guesses is another question, which this does not answer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import results


@dataclass
class Config:
    """Which model, and how large."""

    teacher: str
    """Folder of a Llama-like causal LM (MLPs of gate_proj, up_proj, down_proj)."""
    output: str
    """Where the wide one goes; a folder that does not exist."""
    parameters: int = 110_000_000
    """That it shall have, about."""

    def __post_init__(self) -> None:
        if Path(self.output).exists():
            raise ValueError(f"output is {self.output}, which exists; name another folder or remove it")


def widen(model: Any, parameters: int) -> Any:
    """A model of the same function with about so many parameters. Raises ValueError for MLPs of another kind, and where it has as many already."""
    from transformers import AutoModelForCausalLM

    config = model.config
    mlps = [layer.mlp for layer in getattr(getattr(model, "model", None), "layers", [])]
    if not mlps or not all(hasattr(mlp, name) for mlp in mlps for name in ("gate_proj", "up_proj", "down_proj")):
        raise ValueError(f"a {config.model_type} has no MLPs of gate_proj, up_proj and down_proj to widen")
    here = sum(parameter.numel() for parameter in model.parameters())
    more = (parameters - here) // (3 * config.hidden_size * len(mlps))
    if more < 1:
        raise ValueError(f"parameters is {parameters:,}, but the model has {here:,} already; ask for more")
    wider = type(config).from_dict({**config.to_dict(), "intermediate_size": config.intermediate_size + more})
    made = AutoModelForCausalLM.from_config(wider)
    with torch.no_grad():
        for name, target in made.state_dict().items():
            _fill(target, model.state_dict()[name], incoming=not name.endswith("down_proj.weight"))
    return made


def _fill(target: Tensor, source: Tensor, incoming: bool) -> None:
    """The small tensor in the corner of the large one; beyond it, incoming weights keep their random values and outgoing ones are zero."""
    if not incoming:
        target.zero_()
    target[tuple(map(slice, source.shape))] = source


def run(config: Config) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.teacher, trust_remote_code=False, local_files_only=True, dtype=torch.float32)
    made = widen(model, config.parameters)
    made.save_pretrained(config.output)
    print(f"{sum(parameter.numel() for parameter in made.parameters()):,} parameters, {made.config.intermediate_size:,} units in each MLP")


def main(arguments: list[str] | None = None) -> int:
    return results.command("wide_teacher", __doc__ or "", Config, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
