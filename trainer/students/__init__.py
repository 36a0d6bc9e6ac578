"""The students, one file each. What base.py declares all have; the loop, checkpoints and saved folders ask for no more:

student.forward(batch, chance, noise_of) -> (loss summed over rows, figures)
student.figure_names, own_state(), after_heldout(...), ...

What samplers call depends on what a student predicts:

mdlm, bd3lm, mtp    logits(ids_BL, g_NV, length_B, known=...) -> [N, V] at the masked positions (masked.py declares it)
                    predict(...) -> the same and each draft's; its arguments are each kind's own
mdlm                logits_from(start_B, ...) with a row_cache(): from a position of each row on
bd3lm               logits(..., cache=...) with an empty_cache(): after the blocks that it holds
ar                  logits(ids_BL) -> [B, L, V]: those at t predict the token at t + 1
medusa              no logits, as its heads predict the places after what a frozen backbone has read:
                    propose(ids_BL, g_BJV, cache) -> ([B, J, V], cache), heads_at(hidden_BH, g_BJV) -> [B, J, V]

save_student / load_student: a folder of student.json + model.safetensors. N masked positions, J places that follow.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from noise.storage import DatasetError, atomic_file, read_json, write_json
from trainer.config import MedusaConfig, NoiseConfig, ObjectiveConfig, StudentConfig
from trainer.declared import refuse_larger
from trainer.students.ar import AR
from trainer.students.base import Base
from trainer.students.bd3lm import BD3LM
from trainer.students.mdlm import MDLM
from trainer.students.medusa import Medusa
from trainer.students.mtp import MTP

Student = Base
KINDS: dict[str, type[Base]] = {"ar": AR, "mdlm": MDLM, "bd3lm": BD3LM, "medusa": Medusa, "mtp": MTP}


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
    about, weights = read_json(folder / "student.json"), load_tensors(folder / "model.safetensors")
    try:
        kinds = {"noise": NoiseConfig, "objective": ObjectiveConfig, "medusa": MedusaConfig}
        settings = {**about["student"], **{name: kind(**about["student"].get(name, {})) for name, kind in kinds.items()}}
        refuse_larger(settings, about["vocab_size"], about["block_length"], weights)
        student = build(StudentConfig(**settings), about["vocab_size"], about["block_length"])
    except DatasetError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ArithmeticError) as error:
        raise DatasetError(f"{folder / 'student.json'} does not describe a student of this version: {error}") from None
    if student.config.kind == "ar":
        weights.pop("lm_head.weight", None)
    try:
        student.load_own_state(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise DatasetError(f"{folder / 'model.safetensors'} holds another student than student.json says: {reason}") from None
    student.recipe, student.provenance = about.get("recipe", {}), about.get("provenance", {})
    return student.to(device).eval()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Tensors as safetensors, atomically; returns the file's sha256."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    with atomic_file(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; DatasetError that names it when it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise DatasetError(f"{path} is truncated or damaged ({error})") from None


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
