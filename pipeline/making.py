"""One shard while it is made: rows that cannot be encoded, micro-batches that do not fit, and where the time went.

Rows go through the teacher in the plan's micro-batches, whatever happens to some of them:

    a row that cannot be encoded    is an error that names it; in quarantine it is left out of the shard instead, and a copy of
                                    another row takes its place in the forward pass, so every other row keeps its bits
    a micro-batch that does not fit is made in halves of halves; it need not have the bits that it has elsewhere, so it is recorded

Shapes: B rows, L positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from noise.receipt import Quarantined
from noise.shard import Rows, ShardMetadata
from noise.sketch import TeacherError
from noise.storage import DatasetError
from pipeline.memory import MakeRows, fitting
from pipeline.packing import Blocks

LEAST = 8
"""Rows that any shard may lose to quarantine; a larger one up to half of its own."""


class RowError(DatasetError):
    """A row cannot be encoded."""

    def __init__(self, message: str, again: bool):
        super().__init__(message)
        self.again = again
        """Whether another machine may do better with the same row."""


@dataclass
class Making:
    """What happens to one shard."""

    shard: int
    quarantine: bool = False
    """Whether rows that cannot be encoded are left out."""
    left_out: list[Quarantined] = field(default_factory=list)
    micro_batch: int | None = None
    """Rows that went forward at once where the plan's micro-batch did not fit, else None."""
    seconds: float = 0.0
    """In the teacher and the encoder."""
    processor_seconds: float = 0.0
    """Of the processor, in the same."""

    def leave_out(self, row: int, position: int | None, tokens: int, rows: int, reason: str, again: bool) -> None:
        """Quarantine a row of a shard of `rows`. Raises RowError where that is not allowed, or where so many fail that it is not the data."""
        if any(out.row == row for out in self.left_out):
            return
        reason = reason if position is None else f"position {position}: {reason}"
        where = f"shard {self.shard}, row {row}{', ' if position is not None else ': '}{reason}"
        if not self.quarantine:
            raise RowError(f"{where}; nothing of this shard was written", again)
        self.left_out.append(Quarantined(row, tokens, reason))
        self.left_out.sort(key=lambda out: out.row)
        if len(self.left_out) > max(LEAST, rows // 2):
            message = f"{where}; {len(self.left_out)} of its {rows} rows fail, which is the teacher or the machine and not the data: not quarantined"
            raise RowError(message, again=False)

    @contextmanager
    def timed(self) -> Iterator[None]:
        began, processor = time.monotonic(), time.thread_time()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began
            self.processor_seconds += time.thread_time() - processor

    def micro_batches(self, metadata: ShardMetadata, size: int, input_ids_BL: Blocks, length_B: Blocks, make: MakeRows) -> Iterator[Rows]:
        """`make` on micro-batches of `size` rows, but for those left out. Raises RowError, and MemoryError when not even one row fits."""
        limit = size
        for start in range(0, len(input_ids_BL), size):
            stop = min(start + size, len(input_ids_BL))
            while True:
                out = {row.row for row in self.left_out}
                good = [row for row in range(start, stop) if row not in out]
                if not good:
                    break
                row_B = np.array([good[0] if row in out else row for row in range(start, stop)])
                sequence_id_B = row_B.astype(np.uint64) + np.uint64(self.shard * 2**32)
                try:
                    with self.timed():
                        rows, limit = fitting(make, metadata, sequence_id_B, input_ids_BL[row_B], length_B[row_B], limit)
                except TeacherError as error:
                    at, position = divmod(error.position, metadata.block_length)
                    row = int(row_B[at])
                    self.leave_out(row, position, int(length_B[row]) - 1, len(input_ids_BL), error.reason, again=True)
                    continue
                if limit < size:
                    self.micro_batch = limit
                yield rows if len(good) == len(row_B) else Rows.concatenate([rows[row - start : row - start + 1] for row in good])
                break
