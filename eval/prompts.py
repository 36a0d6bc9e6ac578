"""What is given of each row: BOS, a prompt, or a text with blanks. A file of prompts has one JSON object a line:

    {"text": "The old man"}                           a prompt: blanks follow it, up to the length that is asked for
    {"text": ["The old man ", 3, " the sea."]}        a text with three blank tokens inside; it ends where it says
    {"ids": [464, null, null, 5417], "length": 12}    tokens, null for a blank; `length` counts every position, BOS too

BOS is put before each. Given tokens are never changed. They carry no noise, but for a student that reads the noise of known tokens where
the teacher is at hand (given).
Shapes: P prompts, L positions, B rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noise.storage import DatasetError

BLANK = -1


@dataclass(frozen=True)
class Prompts:
    """Rows to be filled."""

    given_PL: Tensor
    """int64: token ids, BLANK where one is to be written, 0 from the row's length on"""
    length_P: Tensor
    """int64"""

    @classmethod
    def bare(cls, bos: int, length: int) -> Prompts:
        """BOS alone."""
        return cls(torch.tensor([[bos] + [BLANK] * (length - 1)]), torch.tensor([length]))

    @classmethod
    def read(cls, path: Path, tokenizer: Any, bos: int, vocab_size: int, length: int) -> Prompts:
        """A file of prompts; `length` is how long a prompt without blanks becomes, and the longest that any may be. DatasetError by line."""
        rows = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"prompts {path} cannot be read: {error}") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append([bos, *_row(json.loads(line), tokenizer, vocab_size, length - 1)])
                except ValueError as error:
                    raise DatasetError(f"prompts {path}, line {number}: {error}") from None
        if not rows:
            raise DatasetError(f"prompts {path} has no lines; give one JSON object a line, such as {{'text': 'The old man'}}".replace("'", '"'))
        longest = max(map(len, rows))
        return cls(torch.tensor([row + [0] * (longest - len(row)) for row in rows]), torch.tensor([len(row) for row in rows]))

    def rows(self, sequence_id_B: Tensor) -> tuple[Tensor, Tensor]:
        """(given int64 [B, L], length int64 [B]): sequence i continues prompt i modulo their number."""
        prompt_B = sequence_id_B % len(self.given_PL)
        return self.given_PL[prompt_B], self.length_P[prompt_B]

    @property
    def padded(self) -> bool:
        return bool((self.length_P < self.given_PL.shape[1]).any())


def prefix_lengths(prompts: Prompts) -> Tensor:
    """Tokens before the first blank, int64 [P]. Raises ValueError where a token is given after one: a causal LM cannot look ahead."""
    blank_PL = prompts.given_PL == BLANK
    prefix_P = blank_PL.long().argmax(1)
    bad_P = blank_PL.sum(1) != prompts.length_P - prefix_P
    if bool(bad_P.any()):
        raise ValueError(
            f"prompt {int(bad_P.nonzero()[0])} has tokens after its blanks, and a causal LM reads from left to right; give them to a masked student"
        )
    return prefix_P


def _row(line: Any, tokenizer: Any, vocab_size: int, room: int) -> list[int]:
    """Token ids and BLANK of one line, without BOS. Raises ValueError for what is no prompt."""
    if not isinstance(line, dict) or len(line.keys() & {"text", "ids"}) != 1 or line.keys() - {"text", "ids", "length"}:
        raise ValueError(f"{json.dumps(line)[:80]} is not an object with either text or ids, and perhaps length")
    row = _from_ids(line["ids"]) if "ids" in line else _from_text(line["text"], tokenizer)
    wide = [token for token in row if token >= vocab_size]
    if wide:
        raise ValueError(f"token {wide[0]} is outside the student's vocabulary of {vocab_size}")
    last = line.get("length", len(row) + 1 if BLANK in row else room + 1)
    if not isinstance(last, int) or not len(row) < last <= room + 1:
        if len(row) > room:
            raise ValueError(f"it has {len(row)} positions after BOS, and a row has room for {room}")
        raise ValueError(f"it has {len(row)} positions after BOS and length {last}; length must be in {len(row) + 1}..{room + 1}")
    row += [BLANK] * (last - 1 - len(row))
    if BLANK not in row:
        raise ValueError(f"it fills all {last} positions and has no blank; there is nothing to write")
    return row


def _from_ids(ids: Any) -> list[int]:
    if not isinstance(ids, list) or any(not (token is None or (type(token) is int and token >= 0)) for token in ids):
        raise ValueError("ids must be a list of token ids, null for a blank")
    return [BLANK if token is None else token for token in ids]


def _from_text(text: Any, tokenizer: Any) -> list[int]:
    row: list[int] = []
    for part in text if isinstance(text, list) else [text]:
        if isinstance(part, str):
            row += tokenizer(part, add_special_tokens=False)["input_ids"]
        elif type(part) is int and part > 0:
            row += [BLANK] * part
        else:
            raise ValueError(f"text has {json.dumps(part)}; it must be a string, or a list of strings and numbers of blanks")
    return row
