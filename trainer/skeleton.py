"""A causal LM without its weights: on the meta device, from its config alone. What an estimate knows of a frozen backbone.

The config is the one that is named, else that of the backbone's folder or of the hub's cache, else the family that has the
backbone's name, and only then the hub's. A known name asks no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noise.storage import DatasetError, read_json
from trainer.config import MedusaConfig
from trainer.frozen import reason

Settings = dict[str, Any]


def _gpt2(hidden: int, layers: int, heads: int) -> Settings:
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 50_257, "n_positions": 1024}


def _vicuna(hidden: int, mlp: int, layers: int, heads: int, positions: int) -> Settings:
    shape = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "llama", **shape, "vocab_size": 32_000, "max_position_embeddings": positions, "tie_word_embeddings": False}


FAMILIES = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "vicuna-7b": _vicuna(4096, 11_008, 32, 32, 4096),
    "vicuna-7b-v1.5": _vicuna(4096, 11_008, 32, 32, 4096),
    "vicuna-13b": _vicuna(5120, 13_824, 40, 40, 4096),
    "vicuna-13b-v1.5": _vicuna(5120, 13_824, 40, 40, 4096),
}
"""Published shapes, by the last part of their names."""
WAYS_OUT = f"give --backbone_config: a config.json, its folder, or one of {', '.join(FAMILIES)}"


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device."""

    model: Any
    source: str
    """Where its config came from, in words."""

    @property
    def settings(self) -> Settings:
        found: Settings = self.model.config.to_dict()
        return found

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def bytes(self) -> int:
        """Of one of its numbers."""
        return int(self.model.get_output_embeddings().weight.element_size())

    @property
    def hidden(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[1])

    @property
    def matrices(self) -> list[nn.Parameter]:
        """What every position passes through: all but the embeddings and the output layer. Experts count as if all of them ran."""
        body = self.model.base_model
        looked_up = {id(table.weight) for table in body.modules() if isinstance(table, nn.Embedding)}
        return [parameter for parameter in body.parameters() if parameter.dim() >= 2 and id(parameter) not in looked_up]

    @property
    def attention(self) -> int:
        """Layers x heads x width of a head."""
        config = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_hidden_layers * config.num_attention_heads * width)


def skeleton(medusa: MedusaConfig, named: str = "") -> Skeleton:
    """Of a student's backbone; `named`: a config.json, its folder or a family instead. DatasetError where there is no config of a causal LM."""
    settings, source = _settings(medusa, named)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError("the shape of a `medusa` student's backbone needs transformers: pip install transformers") from None
    maker: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model = maker.from_config(config, dtype=getattr(torch, medusa.dtype), trust_remote_code=False)
    except Exception as error:  # transformers passes on errors of several libraries
        raise DatasetError(f"{source} is no config of a causal LM: {reason(error)}") from None
    if model.base_model is model or model.get_output_embeddings() is None:
        raise DatasetError(f"{source} is of a {type(model).__name__}, whose output layer cannot be told from its body")
    if missing := [name for name in ("num_hidden_layers", "num_attention_heads", "hidden_size") if not hasattr(model.config, name)]:
        raise DatasetError(f"{source} is of a {type(model).__name__}, whose config has no {missing[0]}: what its attention costs cannot be told")
    return Skeleton(model.eval().requires_grad_(False), source)


def _settings(medusa: MedusaConfig, named: str) -> tuple[Settings, str]:
    """The config, and where it came from."""
    if named in FAMILIES:
        return FAMILIES[named], f"{named} as published (--backbone_config)"
    if not named and not medusa.backbone:
        raise ValueError("student.medusa.backbone is empty; set it to the folder or hub id of a causal LM, or give --backbone_config")
    if named or Path(medusa.backbone).is_dir():
        return _read(Path(named or medusa.backbone))
    if (cached := _in_cache(medusa)) is not None:
        return read_json(cached), f"{medusa.backbone}, in the hub's cache"
    family = Path(medusa.backbone).name
    if family in FAMILIES:
        return FAMILIES[family], f"{family} as published, by its name: {medusa.backbone} is not here (--backbone_config)"
    try:
        return read_json(_from_hub(medusa)), f"{medusa.backbone}, from the hub"
    except Exception as error:  # the hub's client raises errors of several libraries
        raise DatasetError(
            f"student.medusa.backbone {medusa.backbone!r} is no folder here (working folder {Path.cwd()}), and the hub did not give its config: "
            f"{reason(error)}; {WAYS_OUT}"
        ) from None


def _read(path: Path) -> tuple[Settings, str]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise DatasetError(f"{file} does not exist; {WAYS_OUT}")
    return read_json(file), str(file)


def _in_cache(medusa: MedusaConfig) -> Path | None:
    """The config in the hub's cache. Not by `hf_hub_download(local_files_only=True)`, which asks the network for other things."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(medusa.backbone, "config.json", revision=medusa.revision or None)
    except Exception:  # no client, or no name of the hub
        return None
    return Path(found) if isinstance(found, str) else None


def _from_hub(medusa: MedusaConfig) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(medusa.backbone, "config.json", revision=medusa.revision or None))
