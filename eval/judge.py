"""Generative perplexity: how likely a causal LM that did not make the noise finds the tokens.

A judge with the students' own vocabulary reads token ids; any other reads the decoded text in its own tokens (see reread).
Past its context a window slides by half of it, so that a token there has half a context or more before it. Position 0 is
given and never counted. Likelihoods are summed in float64, in nats.
Shapes: S sequences, B windows at a time, W windows in all, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.causal import CausalLM
from eval.metrics import Array
from eval.reread import own_tokenizer, reread
from noise.storage import DatasetError

_LOGITS_AT_ONCE = 2**25


class Judge:
    """A causal LM that scores token rows of the students' tokenizer. Raises DatasetError when it cannot read them."""

    def __init__(self, name: str, tokenizer: Any, vocab_size: int, device: str = "cpu"):
        self.lm, self.tokenizer = CausalLM(name, device), tokenizer
        self.own = own_tokenizer("judge", name, self.lm.vocab_size, tokenizer, vocab_size)

    @property
    def retokenises(self) -> bool:
        """Whether the text is decoded and read in the judge's own tokens."""
        return self.own is not None

    def score(self, ids_SL: Array, length_S: Array, done: Callable[[int], None] = lambda rows: None) -> tuple[Array, Array]:
        """(sum of -log p float64 [S], counted tokens int64 [S])."""
        if self.own is not None:
            ids_SL, length_S = reread("judge", self.lm.name, self.own, self.tokenizer, ids_SL, length_S)
        longest = int(np.max(length_S))
        context = min(longest, self.lm.max_length or longest)
        window_W4 = windows(length_S, context)
        total_S = np.zeros(len(ids_SL))
        size = max(1, min(256, _LOGITS_AT_ONCE // (context * self.lm.vocab_size)))
        for first in range(0, len(window_W4), size):
            row_B, start_B, stop_B, new_B = window_W4[first : first + size].T
            place_BL = np.minimum(start_B[:, None] + np.arange(context), longest - 1)
            ids_BL, length_B = torch.from_numpy(ids_SL[row_B[:, None], place_BL].astype(np.int64)), torch.from_numpy(stop_B - start_B)
            nll_BL = token_nll(self.lm, ids_BL, length_B).cpu().numpy()
            seen_before_BL = start_B[:, None] + np.arange(1, context) < new_B[:, None]
            np.add.at(total_S, row_B, np.where(seen_before_BL, 0.0, nll_BL).sum(1))
            done(int((stop_B == length_S[row_B]).sum()))
        bad_S = ~np.isfinite(total_S)
        if bad_S.any():
            raise DatasetError(f"judge {self.lm.name} gives sequence {int(bad_S.argmax())} a likelihood of {total_S[bad_S][0]}; choose another judge")
        return total_S, np.maximum(length_S.astype(np.int64) - 1, 0)


def windows(length_S: Array, context: int) -> Array:
    """Windows that slide by half a context, int64 [W, 4] in order of rows: (row, start, stop, first position that is new in it).

    Every token is scored once; past the first window it has half a context or more before it.
    """
    found = []
    for row, length in enumerate(np.asarray(length_S).tolist()):
        start, new = 0, 1
        while True:
            stop = min(start + context, length)
            found.append((row, start, stop, new))
            if stop == length:
                break
            start, new = start + max(1, context // 2), stop
    return np.array(found, np.int64)


@torch.inference_mode()
def token_nll(lm: CausalLM, ids_BL: Tensor, length_B: Tensor) -> Tensor:
    """-log p of each token given those before it, float64 [B, L - 1]; 0 past a row's length."""
    ids_BL, length_B = ids_BL.to(lm.device), length_B.to(lm.device)
    keep_BL = torch.arange(ids_BL.shape[1], device=lm.device) < length_B[:, None]
    padded = not bool(keep_BL.all())
    logits_BLV = lm.model(input_ids=ids_BL, attention_mask=keep_BL.long() if padded else None, use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits_BLV.float().flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="none").view(len(ids_BL), -1)
    return nll.double().masked_fill(~keep_BL[:, 1:], 0.0)
