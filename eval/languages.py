"""Small languages of which everything is known: every sentence, its probability, and so the exact teacher.

    cities      a trip between two different cities of two words each                       `San Diego New York`
    arithmetic  a sum or a product of two digits up to five, worked out                     `3 × 4 = 1 2`
    brackets    six brackets of two kinds, all closed in order                              `( [ ] ) [ ]`
    maze        a way through a 4 x 4 maze, at most eight moves, no square twice, then rest   `→ ↓ ↓ → ↓ → · ·`

All sentences of a language have the same number of tokens. Trips are drawn by the cities' weights, the rest evenly. Each is a
sentence only as a whole: written token by token it is easy, written at once by independent choices it breaks.
Shapes: M sentences, L tokens of a sentence (BOS, token 0, is left out), V vocabulary, K prefixes, S samples.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.exact import ExactTeacher
from eval.metrics import Array

CITIES = {
    "San Francisco": 4, "San Diego": 3, "San Antonio": 2, "New York": 6, "New Orleans": 2, "New Haven": 1, "Los Angeles": 4, "Las Vegas": 3,
    "Las Cruces": 1, "Santa Fe": 1, "Santa Cruz": 1, "Kansas City": 2, "Jersey City": 1, "Fort Worth": 1,
}  # fmt: skip
"""Two-word cities with round weights; they share words, so that two right halves often make no city."""
DIGITS = range(1, 6)
BRACKETS = 6
MAZE = ("....", "..#.", "....", "....")
"""The walker enters at the top left and leaves at the bottom right; # is a wall."""
MOVES = {"↑": (-1, 0), "↓": (1, 0), "←": (0, -1), "→": (0, 1)}
MAZE_MOVES = 8
STILL = "·"

Sentences = dict[tuple[str, ...], float]
"""Sentence -> weight; probabilities are the weights divided by their sum."""


class Language(ExactTeacher):
    """A finite set of sentences of one length with their probabilities; its teacher's state is the prefix that it has read."""

    def __init__(self, name: str, sentences: Sentences):
        self.name = name
        self.symbols = ["", *sorted({symbol for sentence in sentences for symbol in sentence})]
        number = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.ids_ML: Array = np.array([[number[symbol] for symbol in sentence] for sentence in sentences], np.int64)
        weight_M = np.array(list(sentences.values()), np.float64)
        self.p_M: Array = weight_M / weight_M.sum()
        self.length = self.ids_ML.shape[1]
        self._code_M = np.sort(self._codes(self.ids_ML))
        self._at_M = np.argsort(self._codes(self.ids_ML))
        assert (np.diff(self._code_M) > 0).all(), "every sentence once, told apart by its number"

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    @functools.cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        """Every prefix that is no whole sentence, shorter ones first; state 0 is the empty one."""
        return sorted(
            {tuple(ids[:length]) for ids in self.ids_ML.tolist() for length in range(self.length)}, key=lambda prefix: (len(prefix), prefix)
        )

    @functools.cached_property
    def _weights(self) -> tuple[Tensor, Tensor]:
        """(P(prefix and next token), next state), [K, V]."""
        state = {prefix: k for k, prefix in enumerate(self.prefixes)}
        weight_KV = torch.zeros(len(state), self.vocab_size, dtype=torch.float64)
        next_KV = torch.zeros(len(state), self.vocab_size, dtype=torch.int64)
        for ids, p in zip(self.ids_ML.tolist(), self.p_M.tolist(), strict=True):
            for at, token in enumerate(ids):
                weight_KV[state[tuple(ids[:at])], token] += p
                next_KV[state[tuple(ids[:at])], token] = state.get(tuple(ids[: at + 1]), 0)
        return weight_KV, next_KV

    @functools.cached_property
    def transition(self) -> Tensor:
        weight_KV = self._weights[0]
        return weight_KV / weight_KV.sum(1, keepdim=True)

    @property
    def next_state(self) -> Tensor:
        return self._weights[1]

    @functools.cached_property
    def marginals(self) -> Array:
        """P(token at each place), float64 [L, V]."""
        counts = [np.bincount(self.ids_ML[:, at], weights=self.p_M, minlength=self.vocab_size) for at in range(self.length)]
        return np.stack(counts)

    @property
    def entropy(self) -> float:
        """Entropy of a sentence, nats."""
        return float(-(self.p_M * np.log(self.p_M)).sum())

    def find(self, ids_SL: Array) -> Array:
        """Number of the sentence that each sample is, int64 [S]; -1 where it is none. Samples come without BOS."""
        code_S = self._codes(ids_SL)
        place_S = np.searchsorted(self._code_M, code_S).clip(max=len(self._code_M) - 1)
        return np.where(self._code_M[place_S] == code_S, self._at_M[place_S], -1)

    def text(self, ids_L: Array) -> str:
        """What a person reads."""
        return " ".join(self.symbols[token] for token in ids_L)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.ids_ML.tobytes() + self.log_p.numpy().tobytes()).hexdigest()
        return {"kind": "exact language", "name": self.name, "sentences_sha256": digest, "temperature": 1.0}

    def _codes(self, ids_SL: Array) -> Array:
        assert self.vocab_size**self.length < 2**63, "a sentence's number fits an int64"
        code_S: Array = ids_SL.astype(np.int64) @ self.vocab_size ** np.arange(self.length, dtype=np.int64)
        return code_S


def cities() -> Sentences:
    """The first city by its weight, then another by its weight among the rest."""
    total = sum(CITIES.values())
    return {
        (*one.split(), *other.split()): CITIES[one] / total * CITIES[other] / (total - CITIES[one])
        for one in CITIES
        for other in CITIES
        if one != other
    }


def arithmetic() -> Sentences:
    """Two digits from 1 to 5, + or ×, and the two digits of the result."""
    results = {(a, sign, b): a + b if sign == "+" else a * b for a in DIGITS for b in DIGITS for sign in "+×"}
    return {(str(a), sign, str(b), "=", *f"{result:02d}"): 1.0 for (a, sign, b), result in results.items()}


def brackets() -> Sentences:
    """Balanced strings of two kinds of bracket: Catalan(3) x 2^3 of them."""
    return {tuple(string): 1.0 for string in _balanced(BRACKETS // 2)}


def _balanced(pairs: int) -> Iterator[str]:
    """Each once: the first bracket, what it holds, its partner, and what follows."""
    if not pairs:
        yield ""
    for inside in range(pairs):
        for left, right in ("()", "[]"):
            yield from (left + held + right + after for held in _balanced(inside) for after in _balanced(pairs - 1 - inside))


def maze() -> Sentences:
    """Ways through the maze that cross no square twice, filled up with standing still."""
    return {(*way, *[STILL] * (MAZE_MOVES - len(way))): 1.0 for way in _ways([(0, 0)])}


def _ways(seen: list[tuple[int, int]]) -> Iterator[list[str]]:
    row, column = seen[-1]
    if (row, column) == (len(MAZE) - 1, len(MAZE[0]) - 1):
        yield []
    elif len(seen) <= MAZE_MOVES:
        for move, (down, right) in MOVES.items():
            square = (row + down, column + right)
            if 0 <= square[0] < len(MAZE) and 0 <= square[1] < len(MAZE[0]) and MAZE[square[0]][square[1]] != "#" and square not in seen:
                yield from ([move, *rest] for rest in _ways([*seen, square]))


LANGUAGES = {"cities": cities, "arithmetic": arithmetic, "brackets": brackets, "maze": maze}


@functools.cache
def language(name: str) -> Language:
    """A language by name. Raises ValueError for a name that is none."""
    if name not in LANGUAGES:
        raise ValueError(f"language {name!r} is not known; expected {', '.join(LANGUAGES)}")
    return Language(name, LANGUAGES[name]())
