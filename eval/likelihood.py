"""log p of a continuation given what stands before it, under our students: exact where it can be had, else a bound by Monte Carlo.

    ar              exact: the sum of log p(x_t | x_<t)
    bd3lm           exact: the sum over blocks of log p(block | the blocks before), each the mean over all orders in which its positions can be
                    revealed, one at a time (`over_orders`). A block of B positions has 2^B - 1 masks; where `draws` are fewer, a bound as below in
                    each block, and the blocks' bounds add up
    mtp             exact: the continuation in calls of the next n tokens, as many as the student predicts, of which each is chosen alone; the
                    last call shows n masks, too (fewer where the row ends), whatever the continuation needs of them
    mdlm            -log p(x | c) <= NELBO = E over n ~ U{1..M}, S of n positions [ M/n  sum over i in S of -log p(x_i | c, x outside S) ]

M positions continue the context c, which is never masked. This NELBO is the continuous-time one of MDLM (E over t of 1/t sum over
masked), with t integrated out given the number of masked positions: no smallest time, no variance from t. `draws` masks are taken; their n
are a systematic sample of 1..M, so with M dividing draws each n has its exact share. The estimate is unbiased: its expectation is the
NELBO, from which few draws may stray to either side. Continuations differ in length, so an mdlm student gets the bound for all of them.

A student with noise is given PRIOR noise, new in every draw and independent of the text: posterior noise knows the answer. Its
likelihood is p(x|c) = E over g of p(x|c,g), and by Jensen -log p(x|c) <= E over g of NELBO(g): so the MEAN of the draws' bounds has a
bound as its expectation, whatever the number of draws, and is what is returned. log of the mean of exp(-NELBO(g)) would be tighter, but exp
of an estimate is biased upwards (E exp(-estimate) >= exp(-NELBO)), so that is no bound unless each term is exact: over all orders and for
mtp, where sum over blocks (calls) b of log mean over draws of p(x_b | x before b, g_b) is returned (a block's distribution depends on its own
g_b alone, so the expectation factorises; in expectation a bound, exact as draws grow).
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

    exact, about = True, "exact"

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
    """log p under an mdlm, bd3lm or mtp student: exact for mtp, and over all orders where `draws` are enough for a block's masks, else an unbiased
    estimate of a bound.

    Greedy decoding is meant with one forward a block (the whole continuation for mdlm, the next n tokens for mtp), under the first draw's noise.
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
        self._all_orders = self._in_blocks and 2**self._block - 1 <= draws
        summed = self._all_orders or bool(student.ahead)
        self.exact = summed and not noisy
        count = 1 if self.exact else draws
        self._seeds = [step_seed(seed, draw) for draw in range(count)]
        self.about = "exact" if self.exact else f"a lower bound, estimated from {count} draw{'s' * (count > 1)} of " + (
            "prior noise" if summed else "masks" + (" and prior noise" if noisy else "")
        )  # fmt: skip

    @torch.inference_mode()
    def __call__(self, ids: list[int], given: int) -> Scored:
        """Of ids[given:] after ids[:given], given >= 1; all within the student's block length."""
        block_M, draws = self._blocks(given, len(ids)), len(self._seeds)
        if self._student.ahead:
            nll_KCM, best_M = self._calls(ids, given, block_M)
            log_p = (torch.logsumexp(-nll_KCM.sum(2), 0) - math.log(draws)).sum()
        elif self._all_orders:
            masked_SM = every_mask(block_M)
            count = len(masked_SM)
            nll_RM, best_RM = self.losses(ids, given, masked_SM.repeat(draws, 1), torch.arange(draws).repeat_interleave(count))
            best_M = best_RM[0]
            log_p = (torch.logsumexp(over_orders(nll_RM.view(draws, count, -1), block_M), 0) - math.log(draws)).sum()
        else:  # one more row, all masked, says what greedy decoding does
            masked_KM, weight_KM = masks(self._seeds, sequence_id(ids[:given]), given, block_M)
            rows_KM, rows_K = F.pad(masked_KM, (0, 0, 1, 0), value=True), F.pad(torch.arange(draws), (1, 0))
            nll_KM, best_RM = self.losses(ids, given, rows_KM, rows_K)
            best_M = best_RM[0]
            log_p = -(weight_KM * nll_KM[1:]).sum(1).mean()
        return float(log_p), bool((best_M == torch.tensor(ids[given:])).all())

    def _calls(self, ids: list[int], given: int, call_M: Tensor) -> tuple[Tensor, Tensor]:
        """(-log p of each token in its own call, float64 [K, C, M], 0 in others; the first draw's likeliest tokens, int64 [M]) of an mtp student."""
        draws, calls, count = len(self._seeds), int(call_M[-1]) + 1, len(call_M)
        shown = min(calls * self._student.ahead, self._student.block_length - given)
        call_P = torch.arange(shown) // self._student.ahead
        masked_CP = call_P == torch.arange(calls)[:, None]
        whole = [*ids, *[0] * (shown - count)]  # what stands behind is masked or not seen
        nll_RP, best_RP = self.losses(whole, given, masked_CP.repeat(draws, 1), torch.arange(draws).repeat_interleave(calls))
        return nll_RP[:, :count].view(draws, calls, count), best_RP[call_M, torch.arange(count)]

    def losses(self, ids: list[int], given: int, masked_RM: Tensor, draw_R: Tensor) -> tuple[Tensor, Tensor]:
        """(-log p of each masked token, float64 [R, M], 0 where it is not masked; the most likely token there, int64 [R, M], -1 where not).

        Row r sees the noise of draw draw_R[r], int64 [R].
        """
        device, name = self._student.model.embed_tokens.weight.device, sequence_id(ids[:given])
        clean_L = torch.tensor(ids, device=device)
        rows = max(1, _ELEMENTS_AT_ONCE // (masked_RM.shape[1] * self._student.vocab_size))
        nll_RM, best_RM = torch.zeros(masked_RM.shape, dtype=torch.float64), torch.full(masked_RM.shape, -1)
        for start in range(0, len(masked_RM), rows):
            masked_BM = masked_RM[start : start + rows]
            hidden_BL = F.pad(masked_BM, (given, 0)).to(device)
            clean_BL = clean_L.expand_as(hidden_BL)
            noised_BL = clean_BL.masked_fill(hidden_BL, self._student.mask_id)
            row_N, position_N = hidden_BL.nonzero(as_tuple=True)
            g_NV = self._noise(draw_R.to(device)[start + row_N], position_N, name)
            logits_NV = (self._student.predict(noised_BL, clean_BL, g_NV) if self._in_blocks else self._student.predict(noised_BL, g_NV))[0]
            nll_RM[start : start + rows][masked_BM] = F.cross_entropy(logits_NV.double(), clean_BL[hidden_BL], reduction="none").cpu()
            best_RM[start : start + rows][masked_BM] = logits_NV.argmax(1).cpu()
        return nll_RM, best_RM

    def _blocks(self, given: int, stop: int) -> Tensor:
        """Which block (mtp: call) each position of the continuation is part of, counted from its own first one: int64 [M]."""
        position_M = torch.arange(given, stop)
        if self._student.ahead:
            return (position_M - given) // self._student.ahead
        return position_M // self._block - given // self._block if self._in_blocks else torch.zeros_like(position_M)

    def _noise(self, draw_N: Tensor, position_N: Tensor, name: int) -> Tensor | None:
        """Prior noise as the student is given it, [N, V]."""
        if not self._noisy:
            return None
        seed_K = torch.tensor([_signed(seed) for seed in self._seeds], device=position_N.device)
        rows_N5 = philox.rows(seed_K[draw_N], torch.full_like(position_N, name), position_N, NOISE_DRAW)
        return tempered(philox.gumbel(rows_N5, self._student.vocab_size), self._student.noise.kind, self._temperature)


def every_mask(block_M: Tensor) -> Tensor:
    """Every mask of a block, of all blocks at once: bool [S, M], S = 2^B - 1 of the longest block's B positions.

    block_M: int64 [M], ascending from 0. Row S - r masks the i-th position of each block where bit i of r is set, so the first row masks all.
    """
    bit_M = torch.arange(len(block_M)) - first_in_row(block_M)
    subset_S = torch.arange(2 ** int(bit_M.max() + 1) - 1, 0, -1)
    return (subset_S[:, None] >> bit_M) & 1 == 1


def over_orders(nll_KSM: Tensor, block_M: Tensor) -> Tensor:
    """log p of each block's tokens, revealed one at a time in an order that is drawn uniformly: float64 [K, C], from the losses under `every_mask`.

    With f(S) the chance of the tokens at S, given all others: f(S) = mean over i in S of p(x_i | S masked) f(S without i), and f of nothing is 1.
    That is the mean over all B! orders from 2^B - 1 masks. C blocks.
    """
    bit_M = torch.arange(len(block_M)) - first_in_row(block_M)
    size_C = torch.bincount(block_M)
    draws, count, _ = nll_KSM.shape
    nll_KSCB = nll_KSM.new_zeros(draws, count, len(size_C), int(size_C.max()))
    nll_KSCB[:, :, block_M, bit_M] = nll_KSM
    log_f_KCS = nll_KSM.new_zeros(draws, len(size_C), count + 1)
    for subset in range(1, count + 1):
        bits = [bit for bit in range(nll_KSCB.shape[3]) if subset >> bit & 1]
        terms = log_f_KCS[:, :, [subset - (1 << bit) for bit in bits]] - nll_KSCB[:, count - subset][:, :, bits]
        log_f_KCS[:, :, subset] = torch.logsumexp(terms, 2) - math.log(len(bits))
    return log_f_KCS[:, torch.arange(len(size_C)), 2**size_C - 1]


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
