"""Any Hugging Face causal LM, an `ar` student's folder among them: load it, know it again, and let it write from known noise.

A causal LM writes token t as argmax(log p + g_t) with the stream's noise at (seed, sequence, t): exactly its own
distribution, and for a teacher exactly the text that a perfect student would make of the same noise. Temperature, top-k
and nucleus change p first. The loop, with its KV cache, is the one that writes datasets (pipeline.generate).
Shapes: B rows, L positions, P longest prompt, N positions, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.decoding import Decoding, restricted_log_probs
from eval.stream import NOISE_DRAW
from noise import philox
from noise.sketch import TeacherError
from noise.storage import DatasetError, read_json, sha256_file
from pipeline.generate import write
from pipeline.packed import pack

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def folder_identity(folder: Path) -> dict[str, Any]:
    """Hashes of the files that decide a model's numbers: config and safetensors weights, and student.json's settings."""
    weights = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
    identity: dict[str, Any] = {"weights": weights}
    if (folder / "config.json").exists():
        identity["config"] = sha256_file(folder / "config.json")
    if (folder / "student.json").exists():
        about = read_json(folder / "student.json")
        identity["student"] = {name: about.get(name) for name in ("student", "vocab_size", "block_length")}
    return identity


def model_identity(name: str) -> dict[str, Any]:
    """A folder's hashes, or a hub id as it was given. Raises DatasetError for what can be neither."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise DatasetError(f"{name} is not a causal LM: it has no config.json; give a folder made by save_pretrained, or a hub id")
        return folder_identity(Path(name))
    if not _HUB_ID.fullmatch(name):
        raise DatasetError(f"{name} does not exist; give a folder made by save_pretrained, or a hub id")
    return {"hub": name}


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub id. Raises DatasetError when there is none."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{name} has no tokenizer that transformers can load ({_first_line(error)})") from None


class CausalLM:
    """A causal LM in eval mode; `model` is it where it is loaded already. Raises DatasetError when it cannot be loaded, or packed."""

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32", model: Any = None, packed: bool = False):
        import transformers

        self.name, self.device = name, torch.device(device)
        self.identity = model_identity(name)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            if model is None:
                loader: Any = transformers.AutoModelForCausalLM
                model = loader.from_pretrained(name, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DatasetError(f"{name}: transformers cannot load a causal LM from it ({_first_line(error)})") from None
        self.model = model.to(device).eval()
        self.packed = packed
        if packed:
            pack(self.model, "packed", "set device to cpu and dtype to float32, or packed to false")

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int | None:
        """Positions that fit its context, where its config says."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    def sample(self, bos: int, length: int, sequence_id_B: Tensor, seed: int, temperature: float = 1.0) -> Tensor:
        """Rows int64 [B, L] that begin with BOS."""
        given_B = torch.ones_like(sequence_id_B)
        return self.write(given_B[:, None] * bos, given_B, length, sequence_id_B, seed, Decoding(1, temperature))

    def write(self, given_BP: Tensor, given_B: Tensor, length: int, sequence_id_B: Tensor, seed: int, decoding: Decoding) -> Tensor:
        """Rows int64 [B, L] that go on from the first given_B tokens of given_BP, written token by token with a KV cache.

        Of `decoding`, temperature, top_k, nucleus and output are used. Raises DatasetError where logits are not finite.
        """
        try:
            return write(self, FromLogits(decoding), seed, sequence_id_B, given_BP, given_B, length, NOISE_DRAW)[0]
        except TeacherError as error:
            raise DatasetError(f"{self.name}: {error}") from None

    def follow(self, input_ids_BL: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """(logits [B, V] of the next token, KV cache) of tokens that continue what the cache holds."""
        out = self.model(input_ids=input_ids_BL.to(self.device), past_key_values=cache, use_cache=True)
        return out.logits[:, -1], out.past_key_values

    def forward_of(self, hidden: bool = False) -> Callable[[Tensor, Any], tuple[list[Tensor], Any]]:
        """Tokens [B, W] that continue what the cache holds, and the cache -> ([logits [B, W, V]], the cache).

        `hidden` adds the states that the output layer reads, float32 [B, W, H].
        """

        def forward(ids_BW: Tensor, cache: Any) -> tuple[list[Tensor], Any]:
            out = self.model(input_ids=ids_BW.to(self.device), past_key_values=cache, use_cache=True, output_hidden_states=hidden)
            states = [out.hidden_states[-1].float()] if hidden else []
            return [out.logits, *states], getattr(out, "past_key_values", None)

        return forward

    @torch.inference_mode()
    def logits_of(self, ids_BL: Tensor, where_N: Tensor) -> Tensor:
        """Logits [N, V] of the tokens at flat positions b L + t >= 1, each given the row's tokens before it: one forward."""
        logits_BLV = self.model(input_ids=ids_BL.to(self.device), use_cache=False).logits
        return logits_BLV.flatten(0, 1)[where_N.to(self.device) - 1]


@dataclass(frozen=True)
class FromLogits:
    """How a causal LM's token is chosen: argmax(log p + g) of the restricted distribution, or the most likely token."""

    decoding: Decoding
    stop: int | None = None

    def scores(self, logits_NV: Tensor, rows_N5: Tensor) -> tuple[Tensor, Tensor]:
        """(what the token is the argmax of, log p), both [N, V]."""
        log_p_NV = restricted_log_probs(logits_NV, self.decoding)
        return log_p_NV if self.decoding.output == "argmax" else log_p_NV + philox.gumbel(rows_N5, log_p_NV.shape[1]), log_p_NV


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
