"""Decoding the sketch: noise [N, V] that is made where it is read, a chunk of the vocabulary at a time, as often as it is read.

The stream rebuilds any part of the prior noise; what the teacher moved is a short list of entries that replace it. So a
student can take softmax(g) through a projection, or add g to its logits, without [N, V] in memory, and make the noise
again in its backward pass. Equal: every chunk's entries are those of `dense`, up to the generator's 2 ulp.
Shapes: N positions, V vocabulary, C a chunk of it, K entries that are not the prior's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noise import philox
from noise.sketch import Codec, Sketch, dequantise

Generator = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class Noise:
    """Noise of N positions: the prior's at `rows_N5`, but for K entries."""

    rows_N5: Tensor
    vocab_size: int
    owner_K: Tensor
    """int64 [K]: position"""
    index_K: Tensor
    """int64 [K]: vocabulary entry"""
    value_K: Tensor
    """float32 [K]: g there"""

    @classmethod
    def prior(cls, rows_N5: Tensor, vocab_size: int) -> Noise:
        """Noise that knows nothing of a text."""
        nowhere = torch.empty(0, dtype=torch.int64, device=rows_N5.device)
        return cls(rows_N5, vocab_size, nowhere, nowhere, torch.empty(0, device=rows_N5.device))

    @classmethod
    def posterior(cls, sketch: Sketch, token_N: Tensor, rows_N5: Tensor, codec: Codec) -> Noise:
        """What `decode` returns, not made yet."""
        return cls(rows_N5, codec.vocab_size, *corrections(sketch, token_N, rows_N5, codec))

    def prior_where(self, prior_N: Tensor) -> Noise:
        """The same, but the prior's at positions bool [N]."""
        moved_K = ~prior_N[self.owner_K]
        return replace(self, owner_K=self.owner_K[moved_K], index_K=self.index_K[moved_K], value_K=self.value_K[moved_K])

    def __len__(self) -> int:
        return len(self.rows_N5)

    def dense(self) -> Tensor:
        """g, float32 [N, V]."""
        g_NV = philox.gumbel(self.rows_N5, self.vocab_size)
        g_NV[self.owner_K, self.index_K] = self.value_K
        return g_NV

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """(slice of V, g float32 [N, C]) for all of V; `size` is C, a multiple of 4."""
        return self._chunks(size, philox.gumbel, self.value_K)

    def ceiling(self) -> Tensor:
        """float32 [N], at least 0: exp(g - ceiling) never overflows, since the prior's g is below 23."""
        ceiling_N = torch.zeros(len(self), device=self.rows_N5.device)
        return ceiling_N.scatter_reduce(0, self.owner_K, self.value_K, "amax")

    def rates(self, size: int, ceiling_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of V, exp(g - ceiling) float32 [N, C]) for all of V: 1 / a in exponential space, so without a logarithm."""

        def rates(rows_N5: Tensor, stop: int, start: int) -> Tensor:
            return philox.rate(rows_N5, stop, start).mul_(torch.exp(-ceiling_N)[:, None])

        return self._chunks(size, rates, torch.exp(self.value_K - ceiling_N[self.owner_K]))

    def _chunks(self, size: int, generate: Generator, value_K: Tensor) -> Iterator[tuple[slice, Tensor]]:
        assert size % 4 == 0, "a chunk begins with a block of the stream"
        chunk_K = self.index_K // size
        starts = range(0, self.vocab_size, size)
        counts = torch.bincount(chunk_K, minlength=len(starts)).tolist()
        for start, entries_k in zip(starts, torch.split(torch.argsort(chunk_K, stable=True), counts), strict=True):
            stop = min(start + size, self.vocab_size)
            g_NC = generate(self.rows_N5, stop, start)
            g_NC[self.owner_K[entries_k], self.index_K[entries_k] - start] = value_K[entries_k]
            yield slice(start, stop), g_NC


def decode(sketch: Sketch, token_N: Tensor, rows_N5: Tensor, codec: Codec) -> Tensor:
    """Dense posterior noise g, float32 [N, V], of the draw that the rows name (below the codec's R).

    Prior noise everywhere but at the kept entries and the token: nothing else was moved by more than epsilon.
    """
    return Noise.posterior(sketch, token_N, rows_N5, codec).dense()


def corrections(sketch: Sketch, token_N: Tensor, rows_N5: Tensor, codec: Codec) -> tuple[Tensor, Tensor, Tensor]:
    """Where posterior noise is not the prior's: (position int64, vocabulary entry int64, g float32), kept entries first, then the tokens."""
    e0_N, at_N = philox.winner_exponential(rows_N5), torch.arange(len(token_N), device=token_N.device)
    owner_K = torch.repeat_interleave(at_N, sketch.kept_N, output_size=len(sketch.index_K))
    e_K = philox.exponential(philox.words_at(rows_N5[owner_K], sketch.index_K))
    g_K = -torch.log(e_K + dequantise(sketch.code_K, codec) * e0_N[owner_K])
    g_N = -sketch.log_prob_N - e0_N.log()
    return torch.cat([owner_K, at_N]), torch.cat([sketch.index_K, token_N]), torch.cat([g_K, g_N])
