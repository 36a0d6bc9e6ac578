"""Any Hugging Face causal LM: load it, know it again, and let it write from known noise.

A causal LM writes token t as argmax(log p + g_t) with the stream's noise at (seed, sequence, t): exactly its own
distribution, and for a teacher exactly the text that a perfect student would make of the same noise.
Shapes: B rows, L positions, V vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.sampler import NOISE_DRAW
from noise import philox
from noise.storage import DatasetError, read_json, sha256_file

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
    """A causal LM in eval mode, float32. Raises DatasetError when it cannot be loaded."""

    def __init__(self, name: str, device: str = "cpu"):
        import transformers

        self.name, self.device = name, device
        self.identity = model_identity(name)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            loader: Any = transformers.AutoModelForCausalLM
            self.model = loader.from_pretrained(name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DatasetError(f"{name}: transformers cannot load a causal LM from it ({_first_line(error)})") from None
        self.model = self.model.to(device).eval()

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int | None:
        """Positions that fit its context, where its config says."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    @torch.inference_mode()
    def sample(self, bos: int, length: int, sequence_id_B: Tensor, seed: int, temperature: float = 1.0) -> Tensor:
        """Rows int64 [B, L] that begin with BOS, written token by token with a KV cache from the stream's noise."""
        sequence_id_B = sequence_id_B.to(self.device)
        token_B = torch.full_like(sequence_id_B, bos)
        written, cache = [token_B], None
        for position in range(1, length):
            out = self.model(input_ids=token_B[:, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            log_probs_BV = torch.log_softmax(out.logits[:, -1].float() / temperature, -1)
            rows_B5 = philox.rows(seed, sequence_id_B, torch.full_like(sequence_id_B, position), NOISE_DRAW)
            token_B = (log_probs_BV + philox.gumbel(rows_B5, log_probs_BV.shape[1])).argmax(1)
            written.append(token_B)
        return torch.stack(written, 1)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
