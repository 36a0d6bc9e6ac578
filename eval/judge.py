"""Generative perplexity: how likely a causal LM that did not make the noise finds the tokens.

A judge with the students' own vocabulary reads token ids; any other reads the decoded text in its own tokens, after its
own BOS. Position 0 is given and never counted. Likelihoods are summed in float64, in nats.
Shapes: S sequences, B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.causal import CausalLM, load_tokenizer
from eval.metrics import Array
from noise.storage import DatasetError

_LOGITS_AT_ONCE = 2**25


class Judge:
    """A causal LM that scores token rows of the students' tokenizer. Raises DatasetError when it cannot read them."""

    def __init__(self, name: str, tokenizer: Any, vocab_size: int, device: str = "cpu"):
        self.lm, self.tokenizer = CausalLM(name, device), tokenizer
        self.own: Any = None
        try:
            own = load_tokenizer(name)
        except DatasetError:
            if self.lm.vocab_size != vocab_size:
                raise DatasetError(
                    f"judge {name} has no tokenizer and its width {self.lm.vocab_size} is not the students' {vocab_size}; "
                    "put its tokenizer's files beside its weights"
                ) from None
            return
        if own.get_vocab() != tokenizer.get_vocab():
            self.own = own

    @property
    def retokenises(self) -> bool:
        """Whether the text is decoded and read in the judge's own tokens."""
        return self.own is not None

    def score(self, ids_SL: Array, length_S: Array, done: Callable[[int], None] = lambda rows: None) -> tuple[Array, Array]:
        """(sum of -log p float64 [S], counted tokens int64 [S])."""
        if self.own is not None:
            ids_SL, length_S = self._retokenise(ids_SL, length_S)
        longest = int(np.max(length_S))
        if self.lm.max_length is not None and longest > self.lm.max_length:
            raise DatasetError(
                f"judge {self.lm.name} reads {self.lm.max_length} positions, the longest row has {longest}; choose a judge with a longer context"
            )
        rows = max(1, min(256, _LOGITS_AT_ONCE // (longest * self.lm.vocab_size)))
        nll, counted = [], []
        for start in range(0, len(ids_SL), rows):
            ids_BL, length_B = (
                torch.from_numpy(ids_SL[start : start + rows, :longest].astype(np.int64)),
                torch.from_numpy(length_S[start : start + rows].astype(np.int64)),
            )
            nll.append(token_nll(self.lm, ids_BL, length_B).sum(1).cpu().numpy())
            counted.append((length_B - 1).clamp_min(0).numpy())
            done(len(ids_BL))
        total = np.concatenate(nll)
        bad = ~np.isfinite(total)
        if bad.any():
            raise DatasetError(f"judge {self.lm.name} gives sequence {int(bad.argmax())} a likelihood of {total[bad][0]}; choose another judge")
        return total, np.concatenate(counted)

    def _retokenise(self, ids_SL: Array, length_S: Array) -> tuple[Array, Array]:
        bos = self.own.bos_token_id if self.own.bos_token_id is not None else self.own.eos_token_id
        if bos is None:
            raise DatasetError(f"judge {self.lm.name}: its tokenizer has neither BOS nor EOS to begin a text with; choose another judge")
        texts = [
            self.tokenizer.decode(row[1:length], skip_special_tokens=True) for row, length in zip(ids_SL.tolist(), length_S.tolist(), strict=True)
        ]
        rows = [[bos, *ids] for ids in self.own(texts, add_special_tokens=False)["input_ids"]]
        padded = np.full((len(rows), max(map(len, rows))), bos, np.int64)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        return padded, np.array([len(row) for row in rows])


@torch.inference_mode()
def token_nll(lm: CausalLM, ids_BL: Tensor, length_B: Tensor) -> Tensor:
    """-log p of each token given those before it, float64 [B, L - 1]; 0 past a row's length."""
    ids_BL, length_B = ids_BL.to(lm.device), length_B.to(lm.device)
    keep_BL = torch.arange(ids_BL.shape[1], device=lm.device) < length_B[:, None]
    padded = not bool(keep_BL.all())
    logits_BLV = lm.model(input_ids=ids_BL, attention_mask=keep_BL.long() if padded else None, use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits_BLV.float().flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="none").view(len(ids_BL), -1)
    return nll.double().masked_fill(~keep_BL[:, 1:], 0.0)
