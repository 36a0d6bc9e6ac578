"""Stops a run whose loss or gradient is no number any more, or whose loss explodes, and names the sequences.

Losses stay on the device until somebody looks: at every logged line, before every evaluation and checkpoint, and after 64
steps at the latest, so that no checkpoint holds what came after a bad step. All processes look at the same numbers and stop alike.
A loss explodes when it is above `optim.explode` times the median of the last 64 steps. That counts as 1 nat a token at least, and at most as the
loss of a student that knows nothing, which also stands in for it until 16 steps are known: an explosion is never what later ones are held against.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed import World

_MEMORY = 64
_FEWEST = 16
_SHOWN = 32


@dataclass(frozen=True)
class _Watched:
    step: int
    tokens: float
    """of the global batch"""
    parts_M: Tensor
    """this process's losses, a micro-batch each, nats"""
    norm: Tensor
    sequence_id_B: Tensor


class Guard:
    """Watches the steps of one process."""

    def __init__(self, world: World, explode: float, unknowing: float, recent: list[float]):
        """unknowing: loss of a student that knows nothing, nats a token."""
        self._world, self._explode, self._unknowing = world, explode, unknowing
        self._recent = deque(recent, _MEMORY)
        self._watched: list[_Watched] = []

    @property
    def recent(self) -> list[float]:
        """Losses a token of the last steps: a resumed run goes on with them."""
        return list(self._recent)

    @property
    def full(self) -> bool:
        return len(self._watched) >= _MEMORY

    def watch(self, step: int, tokens: float, parts_M: Tensor, norm: Tensor, sequence_id_B: Tensor) -> None:
        """Remember a step: losses of its micro-batches and its gradient's norm on the device, its rows on the host. No synchronisation."""
        self._watched.append(_Watched(step, tokens, parts_M, norm, sequence_id_B))

    def look(self) -> None:
        """Judge the steps since the last look. Raises ValueError, the same on all processes."""
        if not self._watched:
            return
        own_SM = torch.stack([torch.cat((w.parts_M.double(), w.norm.double()[None])) for w in self._watched]).cpu()
        all_RSM = self._world.gather(own_SM)
        for at, watched in enumerate(self._watched):
            loss = float(all_RSM[:, at, :-1].sum()) / watched.tokens
            median = statistics.median_high(self._recent) if len(self._recent) >= _FEWEST else math.inf
            typical = max(1.0, min(median, self._unknowing))
            if not math.isfinite(loss) or (self._explode and loss > self._explode * typical):
                self._stop(watched, loss, typical, all_RSM[:, at, :-1])
            if not math.isfinite(float(all_RSM[0, at, -1])):
                self._stop(watched, math.nan, typical, None)
            self._recent.append(loss)
        self._watched.clear()

    def _stop(self, watched: _Watched, loss: float, typical: float, parts_RM: Tensor | None) -> None:
        ids_RB = self._world.gather(watched.sequence_id_B.cpu())
        if parts_RM is None:
            ids, what = ids_RB.flatten(), f"the gradient of step {watched.step} is not finite, though every loss is; the batch has"
        else:
            count = parts_RM.shape[1]
            rank, micro = divmod(int(torch.nan_to_num(parts_RM, torch.inf, torch.inf, torch.inf).argmax()), count)
            ids = ids_RB[rank].chunk(count)[micro]
            found = "not finite" if not math.isfinite(loss) else f"{loss:.4g} nats a token, above optim.explode {self._explode:g} times {typical:.4g}"
            where = f"micro-batch {micro + 1} of {count}" + (f" on process {rank}" if self._world.size > 1 else "")
            what = f"the loss of step {watched.step} is {found}; {where} has"
        shown = ", ".join(str(int(number) % 2**64) for number in ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
        raise ValueError(f"{what} sequence ids {shown}; look at these rows, or lower optim.lr. The last checkpoint stands.")
