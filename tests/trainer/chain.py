"""A noise dataset whose teacher is known exactly: a Markov chain over V states with a few successors each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from noise import philox
from noise.commit import commit_shard
from noise.dataset import Manifest, Plan
from noise.shard import FORMAT_VERSION, Rows
from noise.sketch import Codec, encode


def transition(vocab_size: int, successors: int = 4, seed: int = 0) -> torch.Tensor:
    """Log transition matrix, float32 [V, V]: some successors of every state, the rest nearly impossible."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(vocab_size, vocab_size, generator=generator)
    logits = torch.full((vocab_size, vocab_size), -12.0)
    logits.scatter_(1, scores.topk(successors, dim=1).indices, torch.randn(vocab_size, successors, generator=generator))
    return logits.log_softmax(-1)


def write_chain(folder: Path, rows: int = 200, block_length: int = 8, vocab_size: int = 13, shards: int = 2, extraction: str = "parallel",
                seed: int = 77, draws: int = 1, text_seed: int = 1, ragged: bool = False, **about: Any) -> Path:  # fmt: skip
    """A finished dataset of chain samples, or rows that the chain writes from the noise after a prompt of one token; rows may be shorter
    than the block when `ragged`. `about`: more of the identity."""
    identity = {
        "format_version": FORMAT_VERSION, "vocab_size": vocab_size, "block_length": block_length, "extraction": extraction,
        "seed": str(seed), "epsilon": 0.125, "draws": draws, "rows": rows, "text_seed": text_seed, **about,
    }  # fmt: skip
    plan = Plan(identity, {}, list(range(shards)))
    plan.write(folder)
    log_p = transition(vocab_size)
    generator = torch.Generator().manual_seed(text_seed)
    for shard in range(shards):
        part = _rows(rows // shards, block_length, log_p, plan, shard, generator, ragged)
        commit_shard(folder, plan.metadata(shard), [part], characters_in=0)
    Manifest.write(folder, plan)
    return folder


def _rows(count: int, length: int, log_p: torch.Tensor, plan: Plan, shard: int, generator: torch.Generator, ragged: bool) -> Rows:
    ids = torch.zeros(count, length, dtype=torch.int64)
    sequence_id = torch.arange(count) + (shard << 32)
    seed, written = int(plan.identity["seed"]), plan.identity["extraction"] == "sequential"
    for t in range(1, length):
        if written and t > 1:
            g_BV = philox.gumbel(philox.rows(seed, sequence_id, torch.full((count,), t)), len(log_p))
            ids[:, t] = (log_p[ids[:, t - 1]] + g_BV).argmax(-1)
        else:
            ids[:, t] = torch.multinomial(log_p[ids[:, t - 1]].exp(), 1, generator=generator)[:, 0]
    lengths = torch.randint(2, length + 1, (count,), generator=generator) if ragged else torch.full((count,), length)
    valid = (torch.arange(length) > 0) & (torch.arange(length) < lengths[:, None])
    ids = ids * (valid | (torch.arange(length) == 0))
    log_prob, kept = np.zeros((count, length), np.float32), np.zeros((count, length), np.uint16)
    index, code = np.zeros(0, np.uint16), np.zeros(0, np.uint8)
    if written:
        log_prob[:, 2:] = (log_p[ids[:, 1:-1], ids[:, 2:]] * valid[:, 2:]).numpy()
    if plan.identity["extraction"] == "parallel":
        row, position = valid.nonzero(as_tuple=True)
        codec = Codec(plan.identity["vocab_size"], plan.identity["epsilon"], plan.identity["draws"])
        places = philox.rows(seed, sequence_id[row], position)
        sketch = encode(log_p[ids[row, position - 1]], ids[row, position], places, codec)
        log_prob[valid.numpy()], kept[valid.numpy()] = sketch.log_prob_N.numpy(), sketch.kept_N.numpy()
        index, code = sketch.index_K.numpy().astype(np.uint16), sketch.code_K.numpy().astype(np.uint8)
    offset = np.concatenate([[0], np.cumsum(kept.sum(1, dtype=np.int64))])
    return Rows(
        sequence_id.numpy().astype(np.uint64), ids.numpy().astype(np.int32), lengths.numpy().astype(np.int32), log_prob, kept, (index, code), offset
    )
