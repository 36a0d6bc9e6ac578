"""GPU memory of a training step, in bytes, by what it is for: a bound for eager execution, since every position counts as masked at once.

    weights, gradients, average    4 P each (no average: 0)      AdamW 8 P      DDP's buckets 4 P, where there are several GPUs
    bfloat16 copies                2 P under autocast, which keeps what it casts until the step ends, and 4 V H for each draft; not of weights
                                   that stream by with the noise
    layers, a slot                 dit     8 H + a (8 H + 2 M) + 2 H with dropout
                                   llama  16 H + a (6 H + 4 M) + 2 H with dropout, and under autocast 3 a H more: each product casts its own input
    head, a position               4 H + a H + 4 V: its input, and log softmax(logits), once for each objective
    draft, a position              a head's, and the softmax that is re-embedded: 4 V + a V under autocast, 4 V without; 2 a H
    noise, a position              4 V where a readout or draft reads it and it is not streamed, and then a V for the input's softmax
    gradient of the logits         4 V + a V a position, of one head at a time
    a chunk of noise               (4 + a) 2^26 where noise is made as it is read

Left out: CUDA's own context (about 1 GB), the allocator's fragments, norms' statistics, the batch. torch.compile keeps less in the layers.
Letters: P trained parameters, a bytes of an activation (2 under bfloat16, else 4), H hidden, M width of the MLP, V vocabulary.
"""

from __future__ import annotations

from trainer.backbone import mlp_width
from trainer.config import StudentConfig
from trainer.streamed import CHUNK_ENTRIES


def states(trained: int, ema: bool, gpus: int) -> dict[str, float]:
    """What lives through the whole run."""
    parts = {"weights": 4, "gradients": 4, "AdamW": 8, "average": 4 * ema, "DDP's buckets": 4 * (gpus > 1)}
    return {name: float(each * trained) for name, each in parts.items() if each}


def copies(config: StudentConfig, vocab_size: int, trained: int) -> float:
    """Of weights in bfloat16, of a whole step."""
    noise = config.noise
    own = vocab_size * (noise.rank or config.hidden) if noise.input != "none" and noise.projection != "tied" else 0
    return 2.0 * (trained - own * _streams(config)) + 4.0 * vocab_size * config.hidden * len(noise.drafts)


def _streams(config: StudentConfig) -> bool:
    """Whether noise is made as it is read, a chunk of the vocabulary at a time."""
    noise = config.noise
    return noise.kind != "none" and (noise.stream or not (noise.readout or noise.drafts))


def kept(config: StudentConfig, vocab_size: int, slots: int, predicted: int, bfloat16: bool) -> dict[str, float]:
    """What autograd keeps from the forward pass for the backward pass, of one row of so many slots and predicted positions."""
    hidden, noise, a = config.hidden, config.noise, 2 if bfloat16 else 4
    width = config.mlp or 4 * hidden if config.backbone == "dit" else mlp_width(hidden, config.mlp)
    dit = 8 * hidden + a * (8 * hidden + 2 * width)
    llama = 16 * hidden + a * ((9 if bfloat16 else 6) * hidden + 4 * width)
    layer = (dit if config.backbone == "dit" else llama) + (2 * hidden if config.dropout else 0)
    head = (4 + a) * hidden + 4 * vocab_size * ((config.objective.nelbo > 0) + (config.objective.token_kd > 0))
    draft = head + 2 * a * hidden + (4 + (a if bfloat16 else 0)) * vocab_size
    dense = noise.kind != "none" and not _streams(config)
    read = dense * (4 + (a if noise.input != "none" else 0)) * vocab_size
    parts = {
        "layers": config.layers * slots * layer,
        "head": predicted * head,
        "drafts": predicted * len(noise.drafts) * draft,
        "noise": predicted * read,
    }
    return {name: float(size) for name, size in parts.items() if size}


def passing(config: StudentConfig, vocab_size: int, predicted: int, bfloat16: bool) -> dict[str, float]:
    """What is there for a moment: the logits' gradient over all rows' predicted positions, and a chunk of noise."""
    a = 2 if bfloat16 else 4
    parts = {"gradient of the logits": float((4 + a) * vocab_size * predicted)}
    return parts | ({"a chunk of noise": float((4 + a) * CHUNK_ENTRIES["cuda"])} if _streams(config) or config.noise.known else {})
