"""The distributions that codecs are measured on: next-token log-probs with a token each, simulated or from a causal LM.

The simulated teacher is a mixture of Zipf laws. At each position p is a Zipf law over an order of the vocabulary of
its own (frequent entries tend to come first, whatever the context) with an exponent of its own (some contexts leave no
choice, some all), mixed with a little of the unigram. It is like GPT-2 in its width, its mean entropy and in having a
heavy tail; nothing else is claimed for it, and a real teacher stands beside it wherever one is given.

Shapes: N positions that are measured, M further ones that a coder may learn from, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noise import philox
from noise.dataset import Manifest, open_shard
from noise.storage import DatasetError

LEAST_EXPONENT, GREATEST_EXPONENT = 1.0, 2.5  # mean entropy 3.1 nats at V = 50,257
UNIGRAM_SHARE = 0.02
CONTEXT_SPREAD = 3.0  # nats by which a context moves an entry's place in the order, standard deviation


@dataclass(frozen=True)
class Distributions:
    """What a teacher said at some positions."""

    name: str
    about: dict[str, Any]
    """What it was, for the JSON."""
    log_probs_NV: Tensor
    """float32"""
    token_N: Tensor
    """int64: the realised tokens"""
    learn_MV: Tensor
    """float32 log-probs at other positions: what a coder may learn from"""
    unigram_V: Tensor
    """float64: the corpus's token frequencies, as a reader of the dataset knows them; they add up to 1"""

    @property
    def vocab_size(self) -> int:
        return self.log_probs_NV.shape[1]

    def shape(self) -> dict[str, float]:
        """How peaked the teacher is: mean entropy in nats, mean top probability, mean mass outside the 64 likeliest entries."""
        entropy = top = outside = 0.0
        for log_probs_nV in self.log_probs_NV.split(64):
            p_nV = log_probs_nV.double().exp()
            entropy += float(-(p_nV * log_probs_nV.double().clamp_min(-1e4)).sum())
            top += float(p_nV.max(1).values.sum())
            outside += float((1 - p_nV.topk(min(64, self.vocab_size)).values.sum(1)).clamp_min(0).sum())
        count = len(self.log_probs_NV)
        return {"entropy": entropy / count, "top": top / count, "outside_64": outside / count}


def simulated(vocab_size: int, positions: int, learn: int, seed: int) -> Distributions:
    """The Zipf mixture, the same for the same arguments; tokens are drawn from it with the stream's sampling draws."""
    random = np.random.default_rng(seed)
    rank_V = np.arange(1, vocab_size + 1)
    unigram_V = (rank_V + 2.7) ** -1.1
    unigram_V /= unigram_V.sum()
    log_probs_AV = np.empty((positions + learn, vocab_size), np.float32)
    for log_probs_V in log_probs_AV:
        exponent = random.uniform(LEAST_EXPONENT, GREATEST_EXPONENT)
        order_V = np.argsort(-np.log(unigram_V) + CONTEXT_SPREAD * random.standard_normal(vocab_size))
        zipf_V = 1.0 / rank_V**exponent
        p_V = UNIGRAM_SHARE * unigram_V
        p_V[order_V] += (1 - UNIGRAM_SHARE) * zipf_V / zipf_V.sum()
        log_probs_V[:] = np.log(p_V)
    log_probs_NV = torch.from_numpy(log_probs_AV[:positions])
    places_N5 = philox.rows(seed, torch.zeros(positions, dtype=torch.int64), torch.arange(positions), philox.SAMPLING_DRAW)
    chunks = zip(log_probs_NV.split(32), places_N5.split(32), strict=True)
    token_N = torch.cat([(log_probs_nV + philox.gumbel(places_n5, vocab_size)).argmax(1) for log_probs_nV, places_n5 in chunks])
    about = {"kind": "simulated", "exponents": [LEAST_EXPONENT, GREATEST_EXPONENT], "unigram_share": UNIGRAM_SHARE, "context_spread": CONTEXT_SPREAD}
    return Distributions("simulated", about, log_probs_NV, token_N, torch.from_numpy(log_probs_AV[positions:]), torch.from_numpy(unigram_V))


def real(teacher: Path, dataset: Path, positions: int, learn: int) -> Distributions:
    """A causal LM's log-probs on the first rows of a dataset. Raises DatasetError when there are too few, or the two do not fit."""
    from pipeline import config
    from pipeline.teacher import Teacher, weights_hash

    manifest = Manifest.read(dataset)
    vocab_size = manifest.identity["vocab_size"]
    model = Teacher(config.Teacher(model=str(teacher)), vocab_size)
    count_V, found = torch.ones(vocab_size, dtype=torch.float64), 0
    log_probs: list[Tensor] = []
    tokens: list[Tensor] = []
    for ids_BL, has_noise_BL in _blocks(dataset, manifest):
        token_n = ids_BL[has_noise_BL]
        count_V += torch.bincount(token_n, minlength=vocab_size)
        if found < positions + learn:
            at_n = has_noise_BL.flatten().nonzero()[: positions + learn - found, 0]
            log_probs.extend(part_nV.float() for _, part_nV in model.log_probs(ids_BL, at_n - 1))
            tokens.append(token_n[: len(at_n)])
            found += len(at_n)
    if found < positions + learn:
        raise DatasetError(f"{dataset} has {found} positions with noise, {positions + learn} are asked for; lower --teacher_positions")
    log_probs_AV, token_A = torch.cat(log_probs), torch.cat(tokens)
    about = {"kind": "real", "weights_sha256": weights_hash(teacher), "dataset_root_hash": manifest.root_hash}
    # every other position is for learning, so that both halves come from the same documents' mixture
    measure_A = torch.zeros(len(token_A), dtype=torch.bool)
    measure_A[torch.linspace(0, len(token_A) - 1, positions).round().long()] = True
    return Distributions("real", about, log_probs_AV[measure_A], token_A[measure_A], log_probs_AV[~measure_A], count_V / count_V.sum())


def _blocks(dataset: Path, manifest: Manifest) -> Iterator[tuple[Tensor, Tensor]]:
    """(token ids int64 [B, L], which have noise [B, L]) of 16 rows at a time, in order."""
    for receipt in manifest.receipts:
        for batch in open_shard(dataset, receipt, manifest.identity):
            for start in range(0, len(batch), 16):
                rows = batch[start : start + 16]
                place_L = np.arange(rows.input_ids.shape[1])[None]
                has_noise_BL = (place_L >= 1) & (place_L < rows.length[:, None])
                yield torch.from_numpy(rows.input_ids.astype(np.int64)), torch.from_numpy(has_noise_BL)
