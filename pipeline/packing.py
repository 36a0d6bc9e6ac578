"""Documents of tokens -> blocks that begin with BOS, no token lost.

`concat`: every document is followed by EOS, documents follow each other, and the stream is cut in pieces of L - 1 tokens,
each behind a BOS. The last block of a shard is padded with 0 and its `length` says where it ends.
Shapes: B blocks, L block length.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.int32]


def concat(documents: Iterable[list[int]], bos: int, eos: int, block_length: int) -> tuple[Blocks, Blocks]:
    """(input_ids int32 [B, L], length int32 [B]); the blocks without BOS and padding are the documents, each with its EOS."""
    parts = [np.asarray([*document, eos], dtype=np.int32) for document in documents]
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    body = block_length - 1
    count = -(-len(stream) // body)
    padded = np.zeros(count * body, np.int32)
    padded[: len(stream)] = stream
    input_ids_BL = np.concatenate([np.full((count, 1), bos, np.int32), padded.reshape(count, body)], axis=1)
    length_B = np.full(count, block_length, np.int32)
    if len(stream) % body:
        length_B[-1] = 1 + len(stream) % body
    return input_ids_BL, length_B
