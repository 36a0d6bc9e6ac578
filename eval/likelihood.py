"""log p of a continuation given what stands before it, under our students: exact where it can be had, else a bound by Monte Carlo.

    ar                      exact: the sum of log p(x_t | x_<t)
    bd3lm, blocks of one    exact: the same sum, from one forward
    mdlm                    -log p(x | c) <= NELBO = E over n ~ U{1..M}, S of n positions [ M/n  sum over i in S of -log p(x_i | c, x outside S) ]
    bd3lm                   the same in each block, given the clean blocks before it; the blocks' bounds add up

M positions continue the context c, which is never masked. This NELBO is the continuous-time one of MDLM (E over t of 1/t sum over
masked), with t integrated out given the number of masked positions: no smallest time, no variance from t. `draws` masks are taken; their n
are a systematic sample of 1..M, so with M dividing draws each n has its exact share. The estimate is unbiased: its expectation is the
NELBO, from which few draws may stray to either side.

A student with noise is given PRIOR noise, new in every draw and independent of the text: posterior noise knows the answer. Its
likelihood is p(x|c) = E over g of p(x|c,g), and by Jensen -log p(x|c) <= E over g of NELBO(g): so the MEAN of the draws' bounds has a
bound as its expectation, whatever the number of draws, and is what is returned. log of the mean of exp(-NELBO(g)) would be tighter, but exp
of an estimate is biased upwards (E exp(-estimate) >= exp(-NELBO)), so that is no bound unless each term is exact: blocks of one, where
sum over t of log mean over draws of p(x_t | x_<t, g_t) is returned (a token's distribution depends on its own g_t alone, so the expectation
factorises; in expectation a bound, exact as draws grow).
The consequence: a student pays for every bit of trust in its noise, since noise that knows nothing misleads it. So the figure understates what it
writes (its argmax given its noise), and ranks students with noise below their twins without; compare like with like. Known tokens carry none,
also for a student that reads it there (noise.known): theirs would be the teacher's, which is not at hand.

Every number is the stream's, at an id that is a hash of the context: choices of one question share noise and masks, and a score depends on
neither batch size nor order, up to float rounding. Past the student's length a window slides (`windows`), and bounds of windows add up.
Shapes: K draws, L positions of a row, M of the continuation, N masked positions of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.causal import CausalLM
from eval.schedules import first_in_row
from eval.stream import LIKELIHOOD_DRAW, NOISE_DRAW, ORDER_DRAW, step_seed, stream_uniform
from noise import philox
from trainer.marginal import tempered

_ELEMENTS_AT_ONCE = 2**25  # logits, and noise, of the rows of one forward

Scored = tuple[float, bool]
"""(log p in nats, whether greedy decoding writes the continuation)"""


class CausalLikelihood:
    """Exact log p under an `ar` student or any causal LM."""

    exact = True

    def __init__(self, lm: CausalLM):
        self._lm = lm

    @torch.inference_mode()
    def __call__(self, ids: list[int], given: int) -> Scored:
        """Of ids[given:] after ids[:given], given >= 1."""
        ids_1L = torch.tensor([ids], device=self._lm.device)
        logits_MV = self._lm.logits_of(ids_1L, torch.arange(given, len(ids)))
        token_M = ids_1L[0, given:]
        greedy = bool((logits_MV.argmax(1) == token_M).all())
        return -float(F.cross_entropy(logits_MV.double(), token_M, reduction="sum")), greedy


class MaskedLikelihood:
    """An unbiased estimate of a lower bound of log p under an mdlm or bd3lm student; exact for a bd3lm student without noise, at block size 1.

    Greedy decoding is meant with one forward a block (the whole continuation for mdlm), under the first draw's noise.
    """

    def __init__(self, student: Any, draws: int, seed: int, noise_temperature: float = 1.0):
        """Raises ValueError for draws below 1 and for a noise temperature that would be ignored."""
        if draws < 1:
            raise ValueError(f"draws is {draws}; it must be at least 1")
        noisy = student.noise.kind != "none"
        if not noisy and noise_temperature != 1:
            raise ValueError(f"noise_temperature is {noise_temperature}, but the student takes no noise (noise.kind: none); drop it")
        if not 0 < noise_temperature < math.inf:
            raise ValueError(f"noise_temperature is {noise_temperature}; it must be above 0")
        self._student, self._temperature = student, noise_temperature
        self._block = getattr(student, "block_size", None) or student.block_length
        self._in_blocks, self._noisy = hasattr(student, "block_size"), noisy
        self._alone = self._in_blocks and self._block == 1
        self.exact = self._alone and not noisy
        self._seeds = [step_seed(seed, draw) for draw in range(1 if self.exact else draws)]

    @torch.inference_mode()
    def __call__(self, ids: list[int], given: int) -> Scored:
        """Of ids[given:] after ids[:given], given >= 1; all within the student's block length."""
        masked_KM, weight_KM = masks(self._seeds, sequence_id(ids[:given]), given, self._blocks(given, len(ids)))
        draw_K = torch.arange(len(masked_KM))
        if self._alone:
            nll_KM, best_M = self.losses(ids, given, masked_KM, draw_K)
            log_p = (torch.logsumexp(-nll_KM, 0) - math.log(len(nll_KM))).sum()
        else:  # one more row, all masked, says what greedy decoding does
            rows_KM, rows_K = F.pad(masked_KM, (0, 0, 1, 0), value=True), F.pad(draw_K, (1, 0))
            nll_KM, best_M = self.losses(ids, given, rows_KM, rows_K)
            log_p = -(weight_KM * nll_KM[1:]).sum(1).mean()
        return float(log_p), bool((best_M == torch.tensor(ids[given:])).all())

    def losses(self, ids: list[int], given: int, masked_RM: Tensor, draw_R: Tensor) -> tuple[Tensor, Tensor]:
        """(-log p of each masked token, float64 [R, M], 0 where it is not masked; the first row's most likely tokens, int64 [M], -1 where not).

        Row r sees the noise of draw draw_R[r], int64 [R].
        """
        device, name = self._student.model.embed_tokens.weight.device, sequence_id(ids[:given])
        clean_L = torch.tensor(ids, device=device)
        rows = max(1, _ELEMENTS_AT_ONCE // (masked_RM.shape[1] * self._student.vocab_size))
        nll_RM, best_M = torch.zeros(masked_RM.shape, dtype=torch.float64), torch.full((masked_RM.shape[1],), -1)
        for start in range(0, len(masked_RM), rows):
            masked_BM = masked_RM[start : start + rows]
            hidden_BL = F.pad(masked_BM, (given, 0)).to(device)
            clean_BL = clean_L.expand_as(hidden_BL)
            noised_BL = clean_BL.masked_fill(hidden_BL, self._student.mask_id)
            row_N, position_N = hidden_BL.nonzero(as_tuple=True)
            g_NV = self._noise(draw_R.to(device)[start + row_N], position_N, name)
            logits_NV = (self._student.predict(noised_BL, clean_BL, g_NV) if self._in_blocks else self._student.predict(noised_BL, g_NV))[0]
            nll_RM[start : start + rows][masked_BM] = F.cross_entropy(logits_NV.double(), clean_BL[hidden_BL], reduction="none").cpu()
            if start == 0:
                best_M[masked_BM[0]] = logits_NV[row_N == 0].argmax(1).cpu()
        return nll_RM, best_M

    def _blocks(self, given: int, stop: int) -> Tensor:
        """Which block each position of the continuation is part of, counted from its own first block: int64 [M]."""
        position_M = torch.arange(given, stop)
        return position_M // self._block - given // self._block if self._in_blocks else torch.zeros_like(position_M)

    def _noise(self, draw_N: Tensor, position_N: Tensor, name: int) -> Tensor | None:
        """Prior noise as the student is given it, [N, V]."""
        if not self._noisy:
            return None
        seed_K = torch.tensor([_signed(seed) for seed in self._seeds], device=position_N.device)
        rows_N5 = philox.rows(seed_K[draw_N], torch.full_like(position_N, name), position_N, NOISE_DRAW)
        return tempered(philox.gumbel(rows_N5, self._student.vocab_size), self._student.noise.kind, self._temperature)


def masks(seeds: list[int], name: int, given: int, block_M: Tensor) -> tuple[Tensor, Tensor]:
    """(what each draw masks, bool [K, M]; the weight of each position's loss there, float64 [K, M]: M_b / n_b of its block b).

    block_M: int64 [M], ascending from 0. In draw k, block b has n_b = 1 + floor(M_b frac(u_b + k / K)) masked positions, those whose own uniform is
    smallest: n_b is uniform on 1..M_b, the positions are uniform given n_b, and draws share u_b.
    """
    count_b = torch.bincount(block_M)
    share_b = stream_uniform(_rows(seeds[:1], name, torch.arange(len(count_b)), LIKELIHOOD_DRAW))
    step_K1 = torch.arange(len(seeds), dtype=torch.float64)[:, None] / len(seeds)
    n_Kb = (count_b * ((share_b + step_K1) % 1.0)).long().clamp_max(count_b - 1) + 1
    time_KM = stream_uniform(_rows(seeds, name, torch.arange(given, given + len(block_M)), ORDER_DRAW)).view(len(seeds), -1)
    rank_KM = (time_KM + block_M).argsort(1).argsort(1) - first_in_row(block_M)  # times are below 1, so blocks stay apart
    return rank_KM < n_Kb[:, block_M], (count_b.double() / n_Kb)[:, block_M]


def windows(ids: list[int], given: int, longest: int) -> Iterator[tuple[list[int], int]]:
    """(row, leading tokens that are given) of each window that together score ids[given:]; ids[0] is BOS and begins every window.

    What fits `longest` positions is one window; else the context is cut on the left. A continuation that does not fit even so is taken
    half a window at a time, each half given the tokens before it.
    """
    room = longest - 1
    done, stop = given, len(ids)
    while done < stop:
        ahead = stop - done if stop - done <= room else room if done == 1 else max(1, room // 2)
        before = ids[max(1, done - (room - ahead)) : done]
        yield [ids[0], *before, *ids[done : done + ahead]], 1 + len(before)
        done += ahead


def _rows(seeds: list[int], name: int, position_M: Tensor, draw: int) -> Tensor:
    """Places in the stream, [K M, 5]."""
    seed_K = torch.tensor([_signed(seed) for seed in seeds]).repeat_interleave(len(position_M))
    return philox.rows(seed_K, torch.full_like(seed_K, name), position_M.repeat(len(seeds)), draw)


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def sequence_id(ids: list[int]) -> int:
    """An int64 that stands for the tokens, in the stream."""
    return int.from_bytes(hashlib.sha256(str(ids).encode("ascii")).digest()[:8], "little", signed=True)
