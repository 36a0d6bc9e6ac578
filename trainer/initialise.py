"""First weights of a student from somebody else's: our students, Hugging Face models, published MDLM and BD3-LM checkpoints.

What fits by meaning and shape is loaded; the report says what was, what kept its random value, and what went unused.

    ours, Llama and its family    by name
    GPT-2                         embedding, attention and, into a dit, MLP and norms; its learned positions and attention biases fit nowhere
    ModernBERT                    embedding and attention; into a llama its MLP, into a dit its norms
    BERT, RoBERTa                 embedding alone: their layers normalise after each branch, ours before, and students learn slower from them
    MDLM, BD3-LM                  all of it into a dit (exactly, see `published`); embedding and attention into a llama
A deeper student takes the layers again from the first. The mask's embedding is theirs if they have one, else the mean token's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from noise.storage import DatasetError, read_json
from trainer import published
from trainer.backbone import ROPE_BASE
from trainer.foreign import Weights, locate, read
from trainer.students.base import Base

_EMBEDDING = "model.embed_tokens.weight"
_ENTRIES = (_EMBEDDING, "model.output.weight", "model.output.bias")
_TOKENS = "embeddings.tok_embeddings.weight"
_MODERNBERT_LAYER = {
    "attn_norm.weight": "norm1.weight", "attn_norm.bias": "norm1.bias", "mlp_norm.weight": "norm2.weight", "mlp_norm.bias": "norm2.bias",
    "attn.Wqkv.weight": "attn_qkv.weight", "attn.Wo.weight": "attn_out.weight", "mlp.Wo.weight": "mlp.down_proj.weight",
}  # fmt: skip
_MODERNBERT_END = {"final_norm.weight": "norm.weight", "final_norm.bias": "norm.bias"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


@dataclass
class _Source:
    """Weights under our names."""

    family: str
    tensors: dict[str, Tensor]
    mask_id: int | None = None
    """Their entry for the mask token, if it is known."""
    unused: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    implied: set[str] = field(default_factory=set)
    """Names of tensors that are not in the file, but follow from it."""


def start_from(student: Base, where: str | Path) -> list[str]:
    """Load what fits into the student, in place; returns lines that say what was and was not. Raises DatasetError where nothing fits."""
    path = locate(str(where))
    weights = read(path)
    source = _named_as_ours(weights)
    own = student.own_state()
    given = _refitted(source.tensors, fused=any(name.endswith("attn_qkv.weight") for name in own))
    depth = 1 + max((int(match[1]) for name in given if (match := _LAYER.fullmatch(name))), default=0)
    loaded, kept, used = [], [], set()
    with torch.no_grad():
        for name, tensor in own.items():
            theirs = _repeated(name, depth)
            value = given.get(theirs)
            if value is None:
                kept.append(f"{name} (not in the checkpoint)")
            elif said := _copy(name, tensor, value, source.mask_id, student.vocab_size):
                loaded.append(name if said == "all" else f"{name} ({said})")
                used.add(theirs)
            else:
                kept.append(f"{name} (shape {tuple(value.shape)}, ours {tuple(tensor.shape)})")
    if not loaded:
        name, tensor = next(iter(own.items()))
        raise DatasetError(
            f"{path}: no tensor fits this student, whose {name} is {tuple(tensor.shape)}; start from a student, or a checkpoint, of the same width"
        )
    unused = [name for name in given if name not in used | source.implied] + source.unused
    lines = [f"started from {path} ({source.family}): {len(loaded)} of {len(own)} tensors loaded", *weights.said, *source.said]
    for what, names in (("loaded", loaded), ("kept its initial value", kept), ("unused there", unused)):
        lines += [f"  {what}: {line}" for line in _grouped(names)]
    return lines


def _copy(name: str, own: Tensor, value: Tensor, mask_id: int | None, vocab_size: int) -> str:
    """Copy what fits; "" if nothing does, else how much. Only rows of the vocabulary may differ in number."""
    if own.shape == value.shape:
        own.copy_(value)
        return "all"
    if name not in _ENTRIES or own.shape[1:] != value.shape[1:] or len(value) < vocab_size:
        return ""
    own[:vocab_size] = value[:vocab_size]
    if len(own) > vocab_size:
        own[vocab_size:] = value.float().mean(0) if mask_id is None else value[mask_id]
    mask = "" if len(own) == vocab_size else ", the mask as their mean" if mask_id is None else f", the mask as their entry {mask_id}"
    return f"{vocab_size} of {len(own)} entries{mask}"


def _named_as_ours(weights: Weights) -> _Source:
    names = weights.tensors.keys()
    if published.is_published(weights.tensors):
        folded, said = published.fold(weights.tensors)
        unused = [name for name in names if not name.removeprefix("backbone.").startswith(published.PARTS)]
        return _Source("published DiT", folded, _mask_entry(weights.folder), unused, said)
    if any(name.endswith("attn.c_attn.weight") for name in names):
        return _gpt2(weights.tensors)
    if any(name.endswith(_TOKENS) for name in names):
        return _modernbert(weights)
    if any(".word_embeddings.weight" in name for name in names):
        return _bert(weights)
    if (weights.folder / "student.json").exists() or (weights.folder / "state.json").exists():
        return _Source("a student of this trainer", weights.tensors)
    return _llama(weights)


def _llama(weights: Weights) -> _Source:
    config = read_json(weights.folder / "config.json") if (weights.folder / "config.json").exists() else {}
    base = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or ROPE_BASE
    said = [] if base == ROPE_BASE else [f"  its rotary base is {base}, ours {ROPE_BASE}: its attention must adapt to other positions"]
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name != "lm_head.weight"}
    head = [name for name in weights.tensors if name == "lm_head.weight" and not config.get("tie_word_embeddings", True)]
    return _Source(str(config.get("model_type", "weights by name")), tensors, unused=head, said=said)


def _gpt2(weights: dict[str, Tensor]) -> _Source:
    """GPT-2's products are stored transposed, query, key and value in one."""
    found = {name.removeprefix("transformer."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    renamed = {"wte.weight": _EMBEDDING, "ln_f.weight": "model.norm.weight", "ln_f.bias": "model.norm.bias"}
    parts = {"ln_1.weight": "norm1.weight", "ln_1.bias": "norm1.bias", "ln_2.weight": "norm2.weight", "ln_2.bias": "norm2.bias",
             "mlp.c_fc.bias": "mlp.0.bias", "mlp.c_proj.bias": "mlp.2.bias"}  # fmt: skip
    transposed = {"attn.c_attn.weight": "attn_qkv.weight", "attn.c_proj.weight": "attn_out.weight", "mlp.c_fc.weight": "mlp.0.weight",
                  "mlp.c_proj.weight": "mlp.2.weight"}  # fmt: skip
    tensors, unused = {}, []
    for name, tensor in found.items():
        match = re.fullmatch(r"h\.(\d+)\.(.*)", name)
        if name in renamed:
            tensors[renamed[name]] = tensor
        elif match and match[2] in parts:
            tensors[f"model.layers.{match[1]}.{parts[match[2]]}"] = tensor
        elif match and match[2] in transposed:
            tensors[f"model.layers.{match[1]}.{transposed[match[2]]}"] = tensor.T.contiguous()
        else:
            unused.append(name)
    return _Source("gpt2", tensors, unused=unused, said=["  GPT-2 has learned positions, ours are rotary: its attention must adapt to them"])


def _modernbert(weights: Weights) -> _Source:
    """Query, key and value are one product, and so are the MLP's two inputs, of which the first is activated. Norms may have no bias: it is 0."""
    prefix = next(name for name in weights.tensors if name.endswith(_TOKENS)).removesuffix(_TOKENS)
    found = {name.removeprefix(prefix): tensor for name, tensor in weights.tensors.items()}
    source = _Source("modernbert", {_EMBEDDING: found.pop(_TOKENS)}, _mask_entry(weights.folder), said=_modernbert_differs(weights.folder))
    for name, tensor in found.items():
        layer, part = re.fullmatch(r"(layers\.\d+\.)?(.*)", name).groups(default="")  # type: ignore[union-attr]
        if layer and part == "mlp.Wi.weight":
            source.tensors |= zip((f"model.{layer}mlp.gate_proj.weight", f"model.{layer}mlp.up_proj.weight"), tensor.chunk(2), strict=True)
        elif part in (_MODERNBERT_LAYER if layer else _MODERNBERT_END):
            source.tensors[f"model.{layer}{(_MODERNBERT_LAYER | _MODERNBERT_END)[part]}"] = tensor
        else:
            source.unused.append(name)
    scales = [name for name in source.tensors if re.search(r"\.norm[12]?\.weight$", name)]
    source.implied = {name.removesuffix("weight") + "bias" for name in scales} - source.tensors.keys()
    source.tensors |= {name: torch.zeros_like(source.tensors[name.removesuffix("bias") + "weight"]) for name in source.implied}
    return source


def _modernbert_differs(folder: Path) -> list[str]:
    """What its layers do otherwise, from its config; published files name their rotary bases in an older way."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    given, bases = config.get("rope_parameters") or {}, set()
    for kind, older, usual in (("full_attention", "global_rope_theta", 160000.0), ("sliding_attention", "local_rope_theta", 10000.0)):
        own = given.get(kind) if "rope_theta" not in given else given
        bases.add(float((own or {}).get("rope_theta") or config.get(older) or usual))
    said = [
        f"  the rotary base of some of its layers is {base:g}, ours {ROPE_BASE:g}: their attention must adapt to other positions"
        for base in sorted(bases - {ROPE_BASE})
    ]
    if config.get("hidden_activation", "gelu") != "silu":
        said.append(f"  its MLP is gated by {config.get('hidden_activation', 'gelu')}, a llama's by silu: it must adapt where it is loaded")
    said.append(f"  some of its layers see {config.get('local_attention', 128)} positions around their own alone, ours all of the row")
    return said


def _bert(weights: Weights) -> _Source:
    name = next(name for name in weights.tensors if name.endswith(".word_embeddings.weight"))
    mask = _mask_entry(weights.folder)
    unused = [other for other in weights.tensors if other != name]
    return _Source("bert or roberta, its embedding alone", {_EMBEDDING: weights.tensors[name]}, mask, unused)


def _mask_entry(folder: Path) -> int | None:
    """The id of a tokenizer's mask token."""
    if not (folder / "tokenizer.json").exists():
        return None
    added = json.loads((folder / "tokenizer.json").read_text()).get("added_tokens", [])
    return next((int(token["id"]) for token in added if token.get("content") in ("[MASK]", "<mask>")), None)


def _refitted(tensors: dict[str, Tensor], fused: bool) -> dict[str, Tensor]:
    """Attention of one kind of network under the names of the other, whose products are fused or apart; other parts under their own names."""
    refitted = dict(tensors)
    for prefix in sorted({f"model.layers.{match[1]}." for name in tensors if (match := _LAYER.fullmatch(name))}):
        apart, out = [f"{prefix}self_attn.{part}_proj.weight" for part in "qkv"], f"{prefix}self_attn.o_proj.weight"
        if fused and all(name in refitted for name in apart):
            refitted[f"{prefix}attn_qkv.weight"] = torch.cat([refitted.pop(name) for name in apart])
            refitted[f"{prefix}attn_out.weight"] = refitted.pop(out)
        elif not fused and f"{prefix}attn_qkv.weight" in refitted:
            refitted |= zip(apart, refitted.pop(f"{prefix}attn_qkv.weight").chunk(3), strict=True)
            refitted[out] = refitted.pop(f"{prefix}attn_out.weight")
    if not fused and "model.norm.bias" in refitted:  # a LayerNorm's weights mean nothing to an RMSNorm
        refitted["model.norm.weight (LayerNorm)"] = refitted.pop("model.norm.weight")
    if fused and "model.norm.bias" not in refitted and "model.norm.weight" in refitted:
        refitted["model.norm.weight (RMSNorm)"] = refitted.pop("model.norm.weight")
    return refitted


def _repeated(name: str, depth: int) -> str:
    """A deeper student takes the layers again from the first: layer i starts as layer i mod depth."""
    match = _LAYER.fullmatch(name)
    return f"model.layers.{int(match[1]) % depth}.{match[2]}" if match else name


def _grouped(names: Iterable[str]) -> list[str]:
    """Equal names but for the layer's number as one line."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1) for name in names)
    return [name if count == 1 and "*" not in name else f"{name} x {count}" for name, count in counts.items()]
