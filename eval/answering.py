"""A student that answers in text: log p of a continuation, or a continuation. What lm-eval asks of a model, without lm-eval.

A likelihood is of the tokens, in nats, given BOS and the context's tokens (see likelihood for what is exact and what a bound).
What is written comes from the samplers of `sample`: one token a forward from a causal LM, `nfe` forwards from a masked student.
Shapes: B texts, L positions.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from eval.causal import CausalLM, load_tokenizer
from eval.config import SampleConfig
from eval.likelihood import CausalLikelihood, MaskedLikelihood, sequence_id, windows
from eval.prompts import BLANK, Prompts
from eval.writers import writer
from noise.storage import DatasetError


class TextStudent:
    """Any student or causal LM of `sample`, with its tokenizer. Raises DatasetError or ValueError for what cannot be scored."""

    def __init__(self, config: SampleConfig, draws: int, noise_temperature: float = 1.0):
        self._writer: Any = writer(config)
        self.identity, self.longest = self._writer.identity, int(self._writer.longest)
        tokenizer = config.tokenizer or self._writer.tokenizer
        if not tokenizer:
            raise DatasetError(f"the dataset that {config.student} was trained on, with its tokenizer/, is not here; set --tokenizer")
        self._tokenizer = load_tokenizer(tokenizer)
        own = self._tokenizer.bos_token_id if self._tokenizer.bos_token_id is not None else self._tokenizer.eos_token_id
        self.bos: int = config.bos if config.bos >= 0 else own
        if self.bos is None or not 0 <= self.bos < self._writer.vocab_size:
            raise ValueError(f"BOS is {self.bos}, not a token of the student's vocabulary of {self._writer.vocab_size}; set --bos")
        self._score, self.noisy = self._likelihood(config, draws, noise_temperature)
        self.exact, self.about = self._score.exact, self._score.about

    def _likelihood(self, config: SampleConfig, draws: int, noise_temperature: float) -> tuple[CausalLikelihood | MaskedLikelihood, bool]:
        model = getattr(self._writer, "lm", None)
        if not isinstance(model, CausalLM):
            student = self._writer.student
            if student.ahead and student.config.context == "row":
                raise DatasetError(
                    f"{config.student} has learnt the last {student.ahead} tokens of whole rows alone (student.context: row), so it says nothing of "
                    "other continuations; train one with context drawn"
                )
            return MaskedLikelihood(student, draws, config.seed, noise_temperature), student.noise.kind != "none"
        if noise_temperature != 1:
            raise ValueError(f"noise_temperature is {noise_temperature}, but a causal LM takes no noise; drop it")
        return CausalLikelihood(model), False

    def log_likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """(log p in nats, whether greedy decoding writes it); an empty context is BOS alone."""
        before, after = encode_pair(self._tokenizer, context, continuation)
        return self._sum([self.bos, *before, *after], 1 + len(before))

    def rolling(self, text: str) -> float:
        """log p of a whole text, nats."""
        return self._sum([self.bos, *self._encode(text)], 1)[0]

    def write(self, contexts: list[str], tokens: int, settings: dict[str, Any]) -> list[str]:
        """Continuations by at most so many tokens: the most likely ones, or sampled where lm-eval's settings have do_sample.

        A text's numbers in the stream are named by its context, so they are the same in any batch.
        """
        rows = [self._prompt(context, tokens) for context in contexts]
        name_B = torch.tensor([sequence_id(row) for row in rows])
        longest = max(map(len, rows))
        given_BL, length_B = torch.tensor([row + [0] * (longest - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])
        written = self._with(settings, max(row.count(BLANK) for row in rows))
        written.prepare(Prompts(given_BL, length_B))
        ids_BL, length_B, _ = written(given_BL, length_B, name_B)
        return [
            self._tokenizer.decode(ids[row.index(BLANK) : length], skip_special_tokens=True)
            for row, ids, length in zip(rows, ids_BL.tolist(), length_B.tolist(), strict=True)
        ]

    def _with(self, settings: dict[str, Any], blanks: int) -> Any:
        """The writer, decoding as lm-eval's settings say, in no more forwards than there are blanks."""
        decoding = self._writer.decoding
        temperature = float(settings.get("temperature", 1.0))
        if settings.get("do_sample") and temperature > 0:
            decoding = replace(decoding, output="sample", temperature=temperature, nucleus=float(settings.get("top_p", 1.0)))
        twin = copy.copy(self._writer)
        twin.decoding = replace(decoding, nfe=min(decoding.nfe, blanks))
        return twin

    def _prompt(self, context: str, tokens: int) -> list[int]:
        """BOS, the context, blanks; a context that leaves less than half of the row to them is cut on the left."""
        before, room = self._encode(context), self.longest - 1
        tokens = min(tokens, max(room - len(before), (room + 1) // 2))
        return [self.bos, *before[max(0, len(before) - (room - tokens)) :], *[BLANK] * tokens]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _sum(self, ids: list[int], given: int) -> tuple[float, bool]:
        outside = [token for token in ids if token >= self._writer.vocab_size]
        if outside:
            raise DatasetError(
                f"token {outside[0]} of the tokenizer is outside the student's vocabulary of {self._writer.vocab_size}; set --tokenizer"
            )
        parts = [self._score(row, known) for row, known in windows(ids, given, self.longest)]
        return sum(log_p for log_p, _ in parts), all(greedy for _, greedy in parts)


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the two, split where the continuation begins: blanks at the context's end are the continuation's, as tokenizers have it."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, whole = encode(stripped), encode(stripped + continuation)
    # where a token spans the border, the pieces are encoded apart
    return (before, whole[len(before) :]) if whole[: len(before)] == before and len(whole) > len(before) else (before, encode(continuation))
