"""One vector for each text: what a language model's last layer holds of it. MAUVE compares sets of these.

Any Hugging Face model that AutoModel loads; it reads as a judge does (see reread), at most as far as its context reaches.
Shapes: S sequences, B rows at a time, L positions, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from eval.causal import model_identity
from eval.metrics import Array
from eval.reread import own_tokenizer, reread
from noise.storage import DatasetError

_POSITIONS_AT_ONCE = 2**14


class Featuriser:
    """A model in eval mode, float32. Raises DatasetError when it cannot be loaded or cannot read the students' rows."""

    def __init__(self, name: str, tokenizer: Any, vocab_size: int, device: str = "cpu", pooling: Literal["last", "mean"] = "last"):
        import transformers

        model_identity(name)
        self.name, self.tokenizer, self.device, self.pooling = name, tokenizer, torch.device(device), pooling
        logging = transformers.utils.logging
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        spoken = logging.get_verbosity()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # of weights that only a causal LM has
        try:
            self.model: Any = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DatasetError(f"{name}: transformers cannot load a model from it ({str(error).strip().splitlines()[0]})") from None
        finally:
            logging.set_verbosity(spoken)  # type: ignore[no-untyped-call]
        self.model = self.model.to(device).eval()
        self.own = own_tokenizer("featuriser", name, self.model.get_input_embeddings().weight.shape[0], tokenizer, vocab_size)

    @torch.inference_mode()
    def features(self, ids_SL: Array, length_S: Array, done: Callable[[int], None] = lambda rows: None) -> Array:
        """float32 [S, D]."""
        if self.own is not None:
            ids_SL, length_S = reread("featuriser", self.name, self.own, self.tokenizer, ids_SL, length_S)
        longest = min(int(np.max(length_S)), getattr(self.model.config, "max_position_embeddings", None) or int(np.max(length_S)))
        size, found = max(1, _POSITIONS_AT_ONCE // longest), []
        for start in range(0, len(ids_SL), size):
            ids_BL = torch.from_numpy(ids_SL[start : start + size, :longest].astype(np.int64)).to(self.device)
            length_B = torch.from_numpy(np.minimum(length_S[start : start + size], longest).astype(np.int64)).to(self.device)
            keep_BL = torch.arange(longest, device=self.device) < length_B[:, None]
            x_BLD = self.model(input_ids=ids_BL, attention_mask=keep_BL.long()).last_hidden_state.float()
            last_BD = x_BLD[torch.arange(len(x_BLD), device=self.device), length_B - 1]
            pooled_BD = last_BD if self.pooling == "last" else (x_BLD * keep_BL[..., None]).sum(1) / length_B[:, None]
            found.append(pooled_BD.cpu().numpy())
            done(len(ids_BL))
        return np.concatenate(found)
