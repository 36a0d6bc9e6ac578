"""The noise and the sketch again, slow and obvious: Python integers and 50-digit decimals, nothing of `noise` imported.

What `noise` computes in torch is compared with this. Equations are DESIGN.md's, in its order.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal, getcontext

import numpy as np

getcontext().prec = 50


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011, section 3.2)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def block(seed: int, sequence_id: int, position: int, draw: int, j: int) -> tuple[int, int, int, int]:
    return philox4x32((j, position + draw * 2**24, sequence_id % 2**32, sequence_id // 2**32), (seed % 2**32, seed // 2**32))


def word(seed: int, sequence_id: int, position: int, draw: int, entry: int) -> int:
    return block(seed, sequence_id, position, draw, entry // 4)[entry % 4]


def winner_word(seed: int, sequence_id: int, position: int, draw: int) -> int:
    return block(seed, sequence_id, position, draw, 0xFFFFFFFF)[0]


def uniform(word: int) -> np.float32:
    """v of a word; numpy rounds an int to float32 to nearest, ties to even."""
    v = (np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32)
    return min(v, np.float32(1 - 2.0**-24))


def exponential(word: int) -> float:
    return float(-np.log1p(-np.float64(uniform(word))))


def posterior_gumbel(log_probs: np.ndarray, token: int, seed: int, sequence_id: int, position: int, draw: int) -> np.ndarray:
    """Algorithm 1 at one position: float64 [V]."""
    e0 = exponential(winner_word(seed, sequence_id, position, draw))
    g = np.empty(len(log_probs))
    for i, log_p in enumerate(log_probs.astype(np.float64)):
        e_i = exponential(word(seed, sequence_id, position, draw, i))
        g[i] = -log_p - np.log(e0) if i == token else -np.log(e_i + np.exp(log_p) * e0)
    return g


def threshold(log_p: float, e0: float, epsilon: float) -> int:
    """T of an entry with log-prob log_p, in exact arithmetic: it is kept iff its word is below."""
    y = Decimal(log_p).exp() * Decimal(e0) / (Decimal(epsilon).exp() - 1)
    scaled = (1 - (-y).exp()) * 2**32 * (1 + Decimal(2) ** -20) - Decimal("0.5")
    return min(2**32, int(scaled.to_integral_value(ROUND_CEILING)))


def moved(log_p: float, e_i: float, e0: float) -> float:
    """How far the teacher moved an entry's noise, in nats: log1p(p_i E_0 / E_i)."""
    return float(np.log1p(np.exp(log_p) * e0 / e_i))
