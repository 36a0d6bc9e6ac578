"""What heads on a frozen causal LM cost in training, of a row of L positions: FLOPs of matrix products as in flops.py, bytes as in memory.py.

Head k has L - 1 - k places, a draft at place j has L - j, the noise's input L - 1. FLOPs, a place:

                     forward              backward
    backbone         2 W + 4 L A          none; at all L positions
    head             2 b H^2              the same; of blocks that follow the first, twice: that one's input has no gradient
      its slots      2 J H^2              twice
      output layer   2 H V                the same where it is the backbone's, which is not trained; twice where it is its own
      readout        2 H                  twice
    draft            2 V H + 2 H^2        V H the same, H^2 twice
      its logits     2 H V                none; of the first, which are the backbone's own: the others' are their head's
      its scale      2 H, with noise      twice; of the first the same
    input            2 V H, 2 r (V + H)   V H and r V the same, of tied weights none; r H twice

Bytes that autograd keeps, a place, and what is there besides:

    head             2 b a H + J (8 H + a H), a H with a readout, a H with an output layer of its own, 4 V for each objective
    draft            a H, a H with noise, 8 V, 4 V for each objective
    noise            4 V where a readout or draft reads it and it is not streamed; a r for an input of low rank
    copies           of a step: under autocast 2 P, but for weights that stream by with the noise, and 2 V H for each head with the backbone's output
                     layer and for each draft if the backbone is not in bfloat16; without autocast 4 V H for each draft if it is in 2 bytes
    for a moment     the logits' gradient, 4 V + a V a place, and 8 V where a readout or draft makes others of them; hidden states, 12 H, and their
                     slots, 8 J H; a chunk of noise
    backbone         d bytes a weight; its activations, at most 4 d (M + H) + 8 H a position, are gone before the heads begin

Letters: W entries of the backbone's matrices, A its layers x heads x width of a head, M its widest matrix, d its bytes a number; b blocks and
J slots of a head; P, V, H, a, r as in memory.py and flops.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainer.heads import Head
from trainer.skeleton import Skeleton
from trainer.streamed import CHUNK_ENTRIES
from trainer.students.medusa import Medusa


def of_backbone(backbone: Skeleton, block_length: int) -> float:
    """FLOPs of one row's forward; there is no backward."""
    weights = sum(matrix.numel() for matrix in backbone.matrices)
    return float(block_length * (2 * weights + 4 * block_length * backbone.attention))


def training(made: Medusa, block_length: int) -> float:
    """FLOPs of the heads, forward and backward of one row."""
    return float(sum(forward * (1 + again) for forward, again in products(made, block_length)))


def products(made: Medusa, block_length: int) -> Iterator[tuple[int, int]]:
    """(FLOPs of the forward of one row, how many times as much in backward), product by product."""
    noise, hidden, vocab = made.noise, made.base.hidden, made.vocab_size
    if made.input is not None:
        yield (block_length - 1) * 2 * vocab * (noise.rank or hidden), int(noise.projection != "tied")
        yield (block_length - 1) * 2 * noise.rank * hidden, 2
    for offset, places, head in _stages(made, block_length):
        if head is not None:
            yield places * 2 * hidden**2, 1
            yield places * 2 * hidden * ((len(head.blocks) - 1) * hidden + _slots(head)), 2
            yield places * 2 * hidden * vocab, 1 if head.lm_head is None else 2
            yield places * 2 * hidden * (head.readout is not None), 2
        if offset in noise.drafts:
            yield places * 2 * hidden * vocab * (head is None), 0
            yield places * 2 * hidden * vocab, 1
            yield places * 2 * hidden**2, 2
            yield places * 2 * hidden * (noise.kind != "none"), 1 if head is None else 2


def copies(made: Medusa, backbone: Skeleton, trained: int, bfloat16: bool) -> float:
    """Bytes of weights in another dtype, of a whole step."""
    noise, one = made.noise, made.vocab_size * made.base.hidden
    if not bfloat16:
        return 4.0 * one * len(noise.drafts) * (backbone.bytes == 2)
    streams = made.vocab_size * (noise.rank or made.base.hidden) if made.input is not None and noise.projection != "tied" else 0
    borrowed = len(noise.drafts) + sum(head.lm_head is None for _, _, head in _stages(made, 0) if head is not None)
    return 2.0 * (trained - streams) + 2.0 * one * borrowed * (made.config.medusa.dtype != "bfloat16")


def kept(made: Medusa, block_length: int, bfloat16: bool) -> dict[str, float]:
    """Bytes that autograd keeps from the forward pass of one row."""
    a, hidden, vocab, noise = 2 if bfloat16 else 4, made.base.hidden, made.vocab_size, made.noise
    objectives = (made.config.objective.nelbo > 0) + (made.config.objective.token_kd > 0)
    parts = {"heads": 0, "drafts": 0, "noise": (block_length - 1) * a * noise.rank}
    for offset, places, head in _stages(made, block_length):
        drafts, reads = offset in noise.drafts, head is not None and head.readout is not None
        if head is not None:
            inner = 2 * len(head.blocks) + (head.lm_head is not None) + reads
            parts["heads"] += places * (a * inner * hidden + (8 + a) * _slots(head) + 4 * vocab * objectives)
        if drafts:
            parts["drafts"] += places * (a * hidden * (1 + (noise.kind != "none")) + 4 * vocab * (2 + objectives))
        if noise.kind != "none" and not noise.stream and (drafts or reads):
            parts["noise"] += places * 4 * vocab
    return {name: float(size) for name, size in parts.items() if size}


def passing(made: Medusa, rows: int, block_length: int, bfloat16: bool) -> dict[str, float]:
    """Bytes that are there for a moment, beside what is kept."""
    a, noise = 2 if bfloat16 else 4, made.noise
    logits = 4 + a + 8 * (noise.readout or bool(noise.drafts))
    parts = {
        "hidden states": rows * block_length * (12 * made.base.hidden + 8 * max(_slots(head) for _, _, head in _stages(made, 0) if head is not None)),
        "logits on their way": rows * (block_length - 1) * logits * made.vocab_size,
    }
    if noise.input != "none" or noise.stream:
        parts["a chunk of noise"] = (4 + a) * CHUNK_ENTRIES["cuda"]
    return {name: float(size) for name, size in parts.items()}


def activations(backbone: Skeleton, rows: int, block_length: int) -> float:
    """Bytes of the backbone's activations, at most; all gone before the heads begin."""
    widest = max(max(matrix.shape) for matrix in backbone.matrices)
    return float(rows * block_length * (backbone.bytes * 4 * (widest + backbone.hidden) + 8 * backbone.hidden))


def _stages(made: Medusa, block_length: int) -> Iterator[tuple[int, int, Head | None]]:
    """(offset from t, places of a row that have it, the head that speaks of it: none of the first, which the backbone itself predicts)."""
    heads: list[Head | None] = [None, *made.heads]  # type: ignore[list-item]
    for offset, head in enumerate(heads, start=1):
        yield offset, max(0, block_length - offset), head


def _slots(head: Head) -> int:
    """J H: width of what a head reads of its slots."""
    return 0 if head.slots is None else head.slots.in_features
