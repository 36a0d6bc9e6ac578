"""The students, one file each, behind one interface.

student.forward(batch, chance) -> (loss summed over rows, figures)      what the loop calls
student.logits(...)                                                     what a sampler calls
save_student / load_student                                             a folder: student.json + model.safetensors
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from noise.storage import DatasetError, atomic_file, read_json, write_json
from trainer.config import NoiseConfig, StudentConfig
from trainer.students.ar import AR
from trainer.students.mdlm import MDLM

Student = AR | MDLM
KINDS: dict[str, type[AR] | type[MDLM]] = {"ar": AR, "mdlm": MDLM}


def build(config: StudentConfig, vocab_size: int, block_length: int) -> Student:
    return KINDS[config.kind](config, vocab_size, block_length)


def save_student(folder: Path, student: Student, weights: dict[str, Tensor], recipe: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write the student's weights and what it is. An `ar` student becomes a Hugging Face checkpoint as well."""
    if isinstance(student, AR):
        from trainer.llama import save_llama

        save_llama(folder, student, weights)
    else:
        save_tensors(folder / "model.safetensors", weights)
    about = {"kind": student.config.kind, "student": asdict(student.config), "vocab_size": student.vocab_size, "block_length": student.block_length}
    write_json(folder / "student.json", {**about, "recipe": recipe, "provenance": provenance})


def load_student(folder: Path, device: str = "cpu") -> Student:
    """A saved student in eval mode, with `recipe` and `provenance`. DatasetError when the folder is not one or is damaged."""
    folder = Path(folder)
    if not (folder / "student.json").exists():
        raise DatasetError(f"{folder} is not a student: it has no student.json; train one with `python -m trainer`")
    about = read_json(folder / "student.json")
    try:
        settings = {**about["student"], "noise": NoiseConfig(**about["student"]["noise"])}
        student = build(StudentConfig(**settings), about["vocab_size"], about["block_length"])
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{folder / 'student.json'} does not describe a student of this version: {error}") from None
    weights = load_tensors(folder / "model.safetensors")
    if student.config.kind == "ar":
        weights.pop("lm_head.weight", None)
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise DatasetError(f"{folder / 'model.safetensors'} holds another student than student.json says: {reason}") from None
    student.recipe, student.provenance = about.get("recipe", {}), about.get("provenance", {})
    return student.to(device).eval()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors as safetensors, atomically."""
    from safetensors.torch import save

    with atomic_file(path) as file:
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; DatasetError that names it when it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise DatasetError(f"{path} is truncated or damaged ({error})") from None


def start_from(student: Student, folder: Path) -> list[str]:
    """Load what fits of a causal or masked checkpoint by name and shape; returns lines that say what was and was not."""
    weights = load_tensors(folder / "model.safetensors")
    own = student.state_dict()
    depth = 1 + max((int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")), default=0)
    loaded, kept = [], []
    with torch.no_grad():
        for name, tensor in own.items():
            given = weights.get(_repeated(name, depth))
            if given is not None and given.shape == tensor.shape:
                tensor.copy_(given)
                loaded.append(name)
            elif name == "model.embed_tokens.weight" and given is not None and given.shape[1] == tensor.shape[1] and given.shape[0] < tensor.shape[0]:
                tensor[: len(given)] = given  # the mask entry starts as the mean token
                tensor[len(given) :] = given.mean(0)
                loaded.append(f"{name} ({len(given)} of {len(tensor)} entries)")
            else:
                kept.append(f"{name} {'(not in the checkpoint)' if given is None else f'(shape {tuple(given.shape)}, ours {tuple(tensor.shape)})'}")
    unused = sorted(set(weights) - set(own) - {"lm_head.weight"})
    if not loaded:
        name, tensor = next(iter(own.items()))
        raise DatasetError(
            f"{folder}: no tensor fits this student, whose {name} is {tuple(tensor.shape)}; start from a student, or a Llama-family checkpoint, "
            "of the same width"
        )
    lines = [f"started from {folder}: {len(loaded)} tensors loaded"]
    lines += [f"  kept its initial value: {name}" for name in kept] + [f"  unused there: {name}" for name in unused]
    return lines


def _repeated(name: str, depth: int) -> str:
    """A deeper student takes the layers again from the first: layer i starts as layer i mod depth."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts[2] = str(int(parts[2]) % depth)
    return ".".join(parts)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
