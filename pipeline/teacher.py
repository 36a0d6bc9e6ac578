"""A Hugging Face causal LM as a source of log-probs.

Weights are safetensors, read from a folder or the hub; code that comes with a model is never run. Log-probs are
log_softmax(logits / temperature) in float32, for a few positions at a time: [B, L, V] in float32 never exists. Where
the model's head applied to its hidden states gives its own logits (tried out once, on a few tokens), not even the
model's own [B, L, V] does.

Equal bits: the same model, micro-batch, dtype, attention, threads, libraries and hardware give the same log-probs.
Shapes: B rows, L positions, H hidden, N positions with noise, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noise.identity import differences
from noise.storage import DatasetError, canonical_json, read_json, sha256_text, weights_hash
from pipeline import config
from pipeline.config import HUB_ID
from pipeline.packed import pack

CHUNK_ENTRIES = 2**21
"""Entries of one chunk of log-probs; a constant, since a matrix product's bits can depend on its shape."""
MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def locate(teacher: config.Teacher) -> tuple[Path, str | None]:
    """(folder, commit) of a teacher: itself when it is a folder, else downloaded from the hub at its revision."""
    if teacher.model is None:
        raise DatasetError("there is no teacher: set teacher.model to a folder or a hub id, or noise.extraction to none")
    folder = Path(teacher.model)
    if folder.is_dir():
        if teacher.revision is not None:
            raise DatasetError(f"teacher.revision is {teacher.revision!r}, but {folder} is a local folder, which has no revisions; leave it null")
        return folder, None
    if HUB_ID.fullmatch(teacher.model) is None:
        raise DatasetError(f"teacher.model {teacher.model!r} is neither a folder (working folder {Path.cwd()}) nor a hub id")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(teacher.model, revision=teacher.revision, allow_patterns=MODEL_FILES))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"teacher.model {teacher.model!r} is not a local folder, and the hub did not give it: {reason}") from None
    return found, found.name


def config_hash(folder: Path) -> str:
    """sha256 of config.json without what does not reach the numbers."""
    quiet = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
    return sha256_text(canonical_json({name: value for name, value in read_json(folder / "config.json").items() if name not in quiet}))


def describe(teacher: config.Teacher) -> tuple[dict[str, Any], int, Path]:
    """(identity of the teacher, width of its logits, its folder), without loading its weights."""
    folder, commit = locate(teacher)
    model = _model(folder, teacher, weights=False)
    head = model.get_output_embeddings()
    width = head.weight.shape[0] if head is not None else model.config.get_text_config().vocab_size
    identity = {
        "weights_sha256": weights_hash(folder),
        "config_sha256": config_hash(folder),
        "revision": commit,
        "dtype": teacher.dtype,
        "temperature": teacher.temperature,
        "attention_across_documents": True,
    }
    return identity, int(width), folder


def check_unchanged(teacher: config.Teacher, planned: dict[str, Any]) -> None:
    """Raises DatasetError by field when a folder does not hold the teacher that was planned (any more). A hub's revision cannot change."""
    folder, commit = locate(teacher)
    if commit is not None:
        return
    found = {"weights_sha256": weights_hash(folder), "config_sha256": config_hash(folder)}
    if changed := differences(found, {name: planned[name] for name in found}, "teacher"):
        raise DatasetError(f"the teacher {folder} was changed since the plan: {'; '.join(changed)}; restore it, or plan into a new output folder")


def longest_block(folder: Path) -> int | None:
    """Positions that the model was built for, where it says so."""
    value = read_json(folder / "config.json")
    limits = [value[name] for name in ("max_position_embeddings", "n_positions", "max_seq_len") if isinstance(value.get(name), int)]
    return min(limits, default=None)


def _model(folder: Path, teacher: config.Teacher, weights: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype = getattr(torch, teacher.dtype)
    if teacher.device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise DatasetError(f"teacher.device_map is {teacher.device_map!r}, which needs the package accelerate: install it, or leave device_map null")
    try:
        if weights:
            return AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                attn_implementation=teacher.attention,
                device_map=teacher.device_map,
                use_safetensors=True,
                trust_remote_code=False,
            )
        settings = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            automatic: Any = AutoModelForCausalLM
            return automatic.from_config(settings, dtype=dtype, attn_implementation=teacher.attention, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"{folder} cannot be loaded as a causal LM ({teacher.dtype}, {teacher.attention} attention): {reason}") from None


class Teacher:
    """A loaded teacher in evaluation mode on one device."""

    def __init__(self, recipe: config.Teacher, vocab_size: int, device: str = "cpu", apart: tuple[int, int] | None = None):
        """`apart` = (EOS, BOS): of the documents in a row, each is read alone, from its own BOS at position 0 on.

        Raises DatasetError when the model cannot be loaded, its logits are not `vocab_size` wide, or it cannot read documents apart.
        """
        self.temperature, self.vocab_size, self.device = recipe.temperature, vocab_size, torch.device(device)
        model = _model(locate(recipe)[0], recipe, weights=True).eval()
        self._model = model if recipe.device_map is not None else model.to(self.device)
        if recipe.device_map is not None:
            self.device = next(self._model.parameters()).device
        if recipe.compile:
            self._compile()
        if recipe.packed:
            pack(self._model, "teacher.packed", "set ray.gpus to 0")
        self._head = self._usable_head()
        self._apart = apart
        if apart is not None:
            self._check_apart(recipe.attention)

    def _compile(self) -> None:
        """Compile the forward pass, and try it. Raises DatasetError where that does not work: eager would have other bits."""
        body = self._model if self._model.base_model is self._model else self._model.base_model
        body.forward = torch.compile(body.forward, dynamic=True)
        try:
            with torch.inference_mode():
                self._model(input_ids=torch.zeros(2, 4, dtype=torch.int64, device=self.device), use_cache=False)
        except Exception as error:  # a compiler's, of many kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DatasetError(f"teacher.compile is true, but the teacher cannot be compiled here: {reason}; set it to false") from None

    @torch.inference_mode()
    def _usable_head(self) -> Any:
        """The output embeddings if they make the model's own logits from its hidden states (no scaling or capping after), else None."""
        probe_BL = torch.arange(min(8, self.vocab_size), device=self.device)[None]
        logits_BLV = self._model(input_ids=probe_BL, use_cache=False).logits
        if logits_BLV.shape[-1] != self.vocab_size:
            raise DatasetError(
                f"the teacher's logits are {logits_BLV.shape[-1]} wide, the plan says {self.vocab_size}; plan into a new output folder"
            )
        head = self._model.get_output_embeddings()
        if head is None or self._model.base_model is self._model:
            return None
        hidden = getattr(self._model.base_model(input_ids=probe_BL, use_cache=False), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
            return None
        tolerance = 1e-4 if logits_BLV.dtype in (torch.float32, torch.float64) else 2e-2
        return head if torch.allclose(head(hidden).float(), logits_BLV.float(), rtol=tolerance, atol=tolerance, equal_nan=True) else None

    def _inputs(self, input_ids_BL: Tensor) -> dict[str, Tensor]:
        """What the model reads of rows: where documents are apart, BOS in the place of each EOS that one follows, and positions that restart there.

        Transformers takes positions that restart, without a mask or a cache, for documents that do not see each other.
        """
        if self._apart is None:
            return {"input_ids": input_ids_BL}
        eos, bos = self._apart
        begins_BL = input_ids_BL == eos
        begins_BL[:, 0] = True
        place_BL = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device).expand_as(input_ids_BL)
        position_BL = place_BL - torch.where(begins_BL, place_BL, 0).cummax(dim=1).values
        return {"input_ids": torch.where(begins_BL, bos, input_ids_BL), "position_ids": position_BL}

    @torch.inference_mode()
    def _check_apart(self, attention: str) -> None:
        """Try it on a few tokens: the second document's logits must be those it has alone, not those it has behind the first."""
        assert self._apart is not None
        eos, bos = self._apart
        words = [token for token in range(min(12, self.vocab_size)) if token not in self._apart]
        first, second = words[: len(words) // 2], words[len(words) // 2 :]
        together_BL = torch.tensor([[bos, *first, eos, *second]], device=self.device)
        alone_BL = torch.tensor([[bos, *second]], device=self.device)
        try:
            apart, across, alone = (
                self._model(**inputs, use_cache=False).logits[0, -len(second) :].float()
                for inputs in (self._inputs(together_BL), {"input_ids": together_BL}, {"input_ids": alone_BL})
            )
            works = bool((apart - alone).abs().max() <= 0.2 * (across - alone).abs().max())
        except (TypeError, ValueError, RuntimeError):  # a model without positions, or a kernel that does not take them
            works = False
        if not works:
            raise DatasetError(
                f"the teacher ({type(self._model).__name__}, {attention} attention) does not keep the documents of a row apart when its positions "
                "restart; try teacher.attention eager, or set packing.attention_across_documents to true"
            )

    @torch.inference_mode()
    def log_probs(self, input_ids_BL: Tensor, at_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of N, log-probs float32 [n, V]) chunk by chunk; `at_N` are flat indices into B L, the log-probs are of the token after each."""
        for part, scores_NV in self.scores(input_ids_BL, at_N):
            yield part, torch.log_softmax(scores_NV.float(), dim=-1)

    @torch.inference_mode()
    def scores(self, input_ids_BL: Tensor, at_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of N, logits / temperature [n, V]): log-probs before they are normalised, in the model's own dtype where the temperature is 1."""
        for part, logits_NV in self.logits(input_ids_BL, at_N):
            yield part, logits_NV if self.temperature == 1 else logits_NV.float() / self.temperature

    @torch.inference_mode()
    def logits(self, input_ids_BL: Tensor, at_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of N, the model's own logits [n, V], before temperature) of the token after each of `at_N`, as in `log_probs`."""
        inputs, at_N = self._inputs(input_ids_BL.to(self.device)), at_N.to(self.device)
        if self._head is not None:
            rows_MX = self._model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        else:
            rows_MX = self._model(**inputs, use_cache=False).logits.flatten(0, 1)
        size = max(1, CHUNK_ENTRIES // self.vocab_size)
        for start in range(0, len(at_N), size):
            part = slice(start, min(start + size, len(at_N)))
            chosen = rows_MX[at_N[part].to(rows_MX.device)]
            yield part, self._head(chosen) if self._head is not None else chosen

    @torch.inference_mode()
    def follow(self, input_ids_BL: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """(logits [B, V] of the token that follows, KV cache) of tokens that continue what the cache holds; the cache is changed in place."""
        input_ids_BL = input_ids_BL.to(self.device)
        if self._head is not None:
            out = self._model.base_model(input_ids=input_ids_BL, past_key_values=cache, use_cache=True)
            logits_BV = self._head(out.last_hidden_state[:, -1])
        else:
            out = self._model(input_ids=input_ids_BL, past_key_values=cache, use_cache=True)
            logits_BV = out.logits[:, -1]
        if getattr(out, "past_key_values", None) is None:
            raise DatasetError(f"the teacher, a {type(self._model).__name__}, has no KV cache, which generation needs; take another")
        return logits_BV.to(self.device), out.past_key_values
