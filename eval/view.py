"""What a masked student reads of a row in one call of adaptive decoding: its next masked positions, and its newest tokens. (An mtp student is shown
the next masks, as many as it predicts, in every call.)

    lookahead (the paper's M)   the row ends before the masked position that follows its next M ones: given tokens behind that are not seen either,
                                until the call in which they come into view
    recompute (the paper's W)   the row is read from W - 1 positions before the place where its last call began to write; the keys and values
                                of the tokens before that are the ones of the call that read them last

Both are 0 where the whole row is read, as in training, and equal to that, token for token, where they are at least the row's length.

To the student a cut row is a row of that length: positions keep their numbers, and nothing stands behind its end. A student that was trained
on full rows alone has never seen one: there all that is not known is masked, to the block's end. One whose dataset has rows that end early has
learnt that the text ends where they do. So the student answers out of its training, or as if the text ended M tokens on. Fewer tokens a call
also mean more positions that come first in theirs, where the student alone decides. Both change the text; measure it before it is relied on.

recompute is an approximation: attention goes both ways, so above the first layer a token's keys and values change with all that is written
behind it, and cached ones have seen masks where there is text now. With one layer it is exact. Every row is read from a place of its own, so a
seed still names a sample at any batch size. It saves computation, not forwards, and holds 2 x layers x L x H numbers a row.
Shapes: B rows, A rows of a call, L positions, N masked positions in view (row-major), V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.conditioning import KnownNoise


class View:
    """Rows that are written from left to right, call by call. length_B: valid positions, None where rows are not padded."""

    def __init__(self, student: Any, lookahead: int, recompute: int, length_B: Tensor | None):
        self._student, self._lookahead, self._recompute, self._length_B = student, lookahead, recompute, length_B
        self._cache: Any = None
        self._began_B: Tensor | None = None  # where each row's last call began to write
        self._moved_B = torch.empty(0, dtype=torch.bool)

    def end(self, ids_BL: Tensor) -> Tensor:
        """Positions before this one are read, int64 [B]."""
        rows, length = ids_BL.shape
        length_B = torch.full((rows,), length, device=ids_BL.device) if self._length_B is None else self._length_B
        if not self._lookahead:
            return length_B
        return torch.minimum(length_B, ((ids_BL == self._student.mask_id).cumsum(1) <= self._lookahead).sum(1))

    def logits(self, ids_BL: Tensor, moving_B: Tensor, g_NV: Tensor | None, known: KnownNoise | None = None) -> Tensor:
        """Logits [N, V] at the masked positions in view of the rows that move; a row that does not move never moves again.

        known: of tokens of the rows that move, numbered among themselves.
        """
        ids_AL, end_A, padded = ids_BL[moving_B], self.end(ids_BL)[moving_B], self._length_B is not None
        if self._lookahead:
            width = int(end_A.max())
            padded = bool((end_A < width).any())
            ids_AL = ids_AL[:, :width].masked_fill(torch.arange(width, device=ids_BL.device) >= end_A[:, None], 0)
            known = None if known is None else known.cut(ids_BL.shape[1], end_A)
        more: dict[str, Any] = {"length_B": end_A} if padded else {}
        more |= {} if known is None else {"known": known}
        if not self._recompute:
            return self._student.logits(ids_AL, g_NV, **more)  # type: ignore[no-any-return]
        return self._student.logits_from(self._start(ids_BL, moving_B), ids_AL, g_NV, cache=self._cache, **more)  # type: ignore[no-any-return]

    def _start(self, ids_BL: Tensor, moving_B: Tensor) -> Tensor:
        """Where the reading of each moving row begins, int64 [A]; the cache is made, or let go of rows that are done."""
        now_B = ((ids_BL == self._student.mask_id).cumsum(1) == 0).sum(1)
        if self._began_B is None:
            self._cache = self._student.row_cache()
            start_B = torch.zeros_like(now_B)
        else:
            stays_A = moving_B[self._moved_B]
            if not bool(stays_A.all()):  # a copy of the whole cache
                self._cache.keep_rows(stays_A)
            start_B = (self._began_B - self._recompute + 1).clamp_min(0)
        self._began_B, self._moved_B = now_B, moving_B
        return start_B[moving_B]
