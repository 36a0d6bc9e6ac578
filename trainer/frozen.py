"""A frozen Hugging Face causal LM under a student: its hidden states and logits, never trained, never saved, known again by its weights' hash.

It is read in evaluation mode, without gradients, in its own dtype whatever autocast says, so training and sampling see the
same numbers. Code that comes with a model is never run. Transformers is imported here, and only when a student needs it.
Shapes: B rows, L positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noise.storage import DatasetError, read_json, weights_hash
from trainer.config import MedusaConfig

MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def locate(config: MedusaConfig) -> tuple[Path, str]:
    """(folder, commit or "") of the backbone: itself when it is a folder, else from the hub or its cache, at its revision."""
    if not config.backbone:
        raise ValueError("student.medusa.backbone is empty; set it to the folder or hub id of a causal LM")
    folder = Path(config.backbone)
    if folder.is_dir():
        if config.revision:
            raise ValueError(
                f"student.medusa.revision is {config.revision!r}, but {folder} is a local folder, which has no revisions; leave it empty"
            )
        return folder, ""
    try:
        from huggingface_hub import snapshot_download

        found = Path(snapshot_download(config.backbone, revision=config.revision or None, allow_patterns=MODEL_FILES))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise DatasetError(
            f"student.medusa.backbone {config.backbone!r} is no folder here (working folder {Path.cwd()}), and the hub did not give it: "
            f"{reason(error)}"
        ) from None
    return found, found.name


class Frozen:
    """A causal LM that is no part of the student's parameters, and shared by its copies.

    Raises DatasetError when it cannot be loaded, or is another one than the student was trained on; ValueError, with the
    setting's name, when it does not fit the dataset.
    """

    def __init__(self, config: MedusaConfig, vocab_size: int, block_length: int):
        self.name = config.backbone
        self.folder, self.revision = locate(config)
        self.weights_sha256 = weights_hash(self.folder)
        if config.weights_sha256 not in ("", self.weights_sha256):
            raise DatasetError(
                f"student.medusa.backbone {self.name} is another model than the heads were trained on: weights_sha256 is {self.weights_sha256} here, "
                f"{config.weights_sha256} there; put that model in its place"
            )
        self._around(_load(self.folder, config.dtype), vocab_size)
        self._check_fit(read_json(self.folder / "config.json"), block_length)
        self._check_head()

    @classmethod
    def bare(cls, config: MedusaConfig, model: Any, vocab_size: int, block_length: int) -> Frozen:
        """Around a model on the meta device (`skeleton`): shapes alone. Raises ValueError where they do not fit the dataset's."""
        made = cls.__new__(cls)
        made.name, made.folder, made.revision, made.weights_sha256 = config.backbone, Path(config.backbone), config.revision, config.weights_sha256
        made._around(model, vocab_size)
        made._check_fit(model.config.to_dict(), block_length)
        return made

    def _around(self, model: Any, vocab_size: int) -> None:
        self.model, self.vocab_size, self._output = model, vocab_size, model.get_output_embeddings()

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self

    @property
    def hidden(self) -> int:
        """H: width of what the output layer reads."""
        return int(self._output.weight.shape[1])

    @property
    def embedding_VH(self) -> Tensor:
        """The token embeddings, float32 unless autocast chooses."""
        weight: Tensor = self.model.get_input_embeddings().weight[: self.vocab_size]
        return weight if torch.is_autocast_enabled(weight.device.type) else weight.float()

    @property
    def output(self) -> torch.nn.Module:
        """The output layer."""
        layer: torch.nn.Module = self._output
        return layer

    def other_tokens(self, tokenizer: Path | None) -> list[str]:
        """The first few entries that are another token than in the tokenizer of a folder, for a message; none where either has none."""
        ours, theirs = _tokens(self.folder), _tokens(tokenizer)
        other = sorted(entry for entry in ours.keys() & theirs.keys() if ours[entry] != theirs[entry])
        return [f"tokenizer entry {entry}: {ours[entry]!r} here, {theirs[entry]!r} there" for entry in other[:3]]

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    @torch.no_grad()
    def read(self, ids_BL: Tensor, cache: Any = None, keep: bool = False) -> tuple[Tensor, Any]:
        """(hidden states after the last norm, float32 [B, L, H], KV cache) of tokens that continue what the cache holds.

        `keep` starts a cache where there is none; a cache that is given is changed in place (`cache.crop(-n)` takes the last n tokens back).
        """
        with torch.autocast(ids_BL.device.type, enabled=False):
            out = self.model.base_model(input_ids=ids_BL, past_key_values=cache, use_cache=keep or cache is not None)
        return out.last_hidden_state.float(), getattr(out, "past_key_values", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., V] from hidden states [..., H]; the gradient passes through to them."""
        return self._output(hidden.to(self._output.weight.dtype)).float()  # type: ignore[no-any-return]

    def _check_fit(self, settings: dict[str, Any], block_length: int) -> None:
        width, vocab_size = int(self._output.weight.shape[0]), self.vocab_size
        if width != vocab_size:
            raise ValueError(
                f"student.medusa.backbone {self.name} has logits of width {width}, the dataset's vocab_size is {vocab_size} "
                f"({abs(width - vocab_size)} {'fewer' if width < vocab_size else 'more'}: another tokenizer, or a padded output layer); "
                "take the dataset's teacher or a model of its width, or extract the text with this backbone as teacher"
            )
        limits = [settings[name] for name in ("max_position_embeddings", "n_positions", "max_seq_len") if isinstance(settings.get(name), int)]
        if min(limits, default=block_length) < block_length:
            raise ValueError(f"student.medusa.backbone {self.name} reads {min(limits)} positions, the dataset's block_length is {block_length}")

    @torch.no_grad()
    def _check_head(self) -> None:
        """The heads end in the backbone's own output layer: that alone must make its logits (no scaling or capping after it)."""
        probe_BL = torch.arange(min(8, self.vocab_size), device=self._output.weight.device)[None]
        theirs_BLV = self.model(input_ids=probe_BL, use_cache=False).logits.float()
        hidden_BLH = self.read(probe_BL)[0]
        width = self.embedding_VH.shape[1]
        if hidden_BLH.shape[-1] != self.hidden or width != self.hidden:
            raise ValueError(
                f"student.medusa.backbone {self.name}: its embeddings are {width} wide, its hidden states {hidden_BLH.shape[-1]}, its output layer "
                f"{self.hidden}; a head needs the three to be equal, so take another model"
            )
        tolerance = 1e-4 if self._output.weight.dtype == torch.float32 else 2e-2
        if not torch.allclose(self.logits(hidden_BLH), theirs_BLV, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise ValueError(
                f"student.medusa.backbone {self.name} scales or caps its logits after the output layer, which heads cannot share; take another model"
            )


def _tokens(folder: Path | None) -> dict[int, str]:
    """Id -> token of the tokenizer in a folder; empty where there is none."""
    if folder is None or not any((folder / name).exists() for name in TOKENIZER_FILES):
        return {}
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).get_vocab()
    except Exception as error:  # transformers passes on errors of several libraries
        raise DatasetError(f"{folder}: transformers cannot load its tokenizer ({reason(error)})") from None
    return {entry: token for token, entry in found.items()}


def _load(folder: Path, dtype: str) -> Any:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ValueError(
            "a `medusa` student needs transformers for its backbone: pip install transformers, then run the same command again"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    try:
        model, found = loader.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers passes on errors of several libraries
        raise DatasetError(f"student.medusa.backbone {folder} cannot be loaded as a causal LM: {reason(error)}") from None
    if found["missing_keys"]:
        raise DatasetError(f"student.medusa.backbone {folder} lacks weights: {', '.join(sorted(found['missing_keys'])[:3])}, ...")
    if model.base_model is model or model.get_output_embeddings() is None:
        raise DatasetError(f"student.medusa.backbone {folder} is a {type(model).__name__}, whose output layer cannot be told from its body")
    return model.eval().requires_grad_(False)


def reason(error: Exception) -> str:
    """Its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
