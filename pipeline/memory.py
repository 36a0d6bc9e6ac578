"""What fits in memory: micro-batches that do not are made in halves, and the largest that does is found by trying.

A micro-batch made in parts need not have the bits that it has whole, so the plan fixes its size, and whoever had to go
below it says so. Shapes: B rows, L positions.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import torch

from noise.shard import Rows, ShardMetadata
from noise.sketch import TeacherError
from pipeline.packing import Blocks

MakeRows = Callable[[ShardMetadata, np.ndarray, Blocks, Blocks], Rows]
"""(metadata, sequence_id uint64 [B], input_ids int32 [B, L], length int32 [B]) -> Rows. Raises TeacherError whose position is flat in B L."""
POSITIONS = {"cuda": 2**15, "cpu": 2**12}
"""Of the largest micro-batch that is tried: enough to keep the device busy."""


def largest(make: MakeRows, metadata: ShardMetadata, row_1L: Blocks, length: int, device: str) -> int:
    """Rows in the largest micro-batch that fits, a power of two, found by making copies of one row. Raises MemoryError when one row does not."""
    size = 2 ** int(np.log2(max(1, POSITIONS.get(device, POSITIONS["cpu"]) // metadata.block_length)))
    places = np.arange(size, dtype=np.uint64), np.repeat(row_1L, size, axis=0), np.full(size, length, np.int32)
    try:
        return fitting(make, metadata, *places, size)[1]
    except TeacherError:  # what a teacher says of a made-up row is no matter here, and it fitted
        return size


def fitting(
    make: MakeRows, metadata: ShardMetadata, sequence_id_B: np.ndarray, input_ids_BL: Blocks, length_B: Blocks, limit: int
) -> tuple[Rows, int]:
    """(the rows, made at most `limit` at once and in halves of that where memory is short, how many at once in the end)."""
    parts: list[Rows] = []
    start = 0
    while start < len(sequence_id_B):
        part = slice(start, min(start + limit, len(sequence_id_B)))
        try:
            parts.append(make(metadata, sequence_id_B[part], input_ids_BL[part], length_B[part]))
            start = part.stop
            continue
        except TeacherError as error:
            raise TeacherError(error.position + start * metadata.block_length, error.reason) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if part.stop - start == 1:
            raise MemoryError(
                f"shard {metadata.shard}: not even one row of {metadata.block_length} positions fits in memory beside the teacher; take shorter "
                "blocks, a narrower teacher.dtype, fewer workers, or spread the teacher over several GPUs (teacher.device_map)"
            )
        release()  # outside of except, whose traceback holds what was allocated
        limit = max(1, (part.stop - start) // 2)
    return Rows.concatenate(parts), limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: a GPU's, or the machine's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in ("not enough memory", "can't allocate memory", "out of memory"))


def release() -> None:
    """Give back what a failed attempt left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
