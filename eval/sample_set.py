"""Samples of one student: how its text is drawn, what is given of it, and where it is kept.

    python -m eval sample --student STUDENT --output FOLDER --nfe 4                          4 forwards, even groups
    python -m eval sample ... --nfe 4 --order confidence                                     the surest positions first
    python -m eval sample ... --sampler ancestral --nfe 64                                   MDLM's own reverse process
    python -m eval sample ... --sampler first_hitting                                        one token a forward
    python -m eval sample ... --sampler adaptive --auxiliary SMALL_LM --student_weight 0.7   a small causal LM says how many at once
    python -m eval sample ... --sampler adaptive ... --lookahead 16 --recompute 8            16 masks in view, older tokens from a cache (approximate)
    python -m eval sample ... --prompts prompts.jsonl                                        prompts, or texts with blanks
    python -m eval sample --student TEACHER_OR_AR_STUDENT --output FOLDER                    a causal LM, with a KV cache
    python -m eval sample --student MEDUSA --output FOLDER                                   its backbone's same text, in fewer calls
    python -m eval sample --student TEACHER --drafter STUDENT --batch 1 --packed true ...    a causal LM's same text, in fewer calls

A line of a prompts file is {"text": "The old man"}, {"text": ["The old man ", 3, " the sea."]} with 3 blanks inside, or
{"ids": [464, null, 5417], "length": 12}; given tokens stay as they are. The set is one Arrow file: sequence_id, input_ids,
length, and nfe, the forwards that were really made for each row, which may be fewer than were asked for. The same command
finds the set again, or continues it where it was stopped. The seed, not the batch size, decides the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eval import samples, tables
from eval.causal import load_tokenizer
from eval.config import SampleConfig
from eval.metrics import Array
from eval.progress import Progress
from eval.prompts import Prompts
from eval.writers import Writer, writer
from noise.storage import DatasetError

_BARE = 1024


@dataclass(frozen=True)
class SampleSet:
    """A finished set."""

    path: Path
    tokenizer: Any
    vocab_size: int
    columns: dict[str, Array]
    """input_ids int32 [S, L], length int32 [S], nfe int32 [S], sequence_id uint64 [S]"""
    asked: int
    """forwards that were asked for, 0 where the sampler takes what it takes"""

    def texts(self, count: int) -> list[str]:
        """The first rows, BOS left out."""
        rows = zip(self.columns["input_ids"][:count], self.columns["length"], strict=False)
        return [self.tokenizer.decode(row[1:length].tolist()) for row, length in rows]

    @property
    def made(self) -> str:
        """The forwards that were made, beside those that were asked for."""
        nfe_S = self.columns["nfe"]
        spread = f"{nfe_S.mean():.2f} a sequence" + (f" ({nfe_S.min()} to {nfe_S.max()})" if nfe_S.min() < nfe_S.max() else "")
        return spread + (f", {self.asked} asked for" if self.asked else "")


def sample_set(config: SampleConfig) -> SampleSet:
    """Draw the set, or find it. Raises DatasetError or ValueError before the first forward for what does not fit together."""
    student = writer(config)
    tokenizer = load_tokenizer(_tokenizer_of(config, student))
    bos = config.bos if config.bos >= 0 else tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None or not 0 <= bos < student.vocab_size:
        raise ValueError(f"BOS is {bos}, not a token of the student's vocabulary of {student.vocab_size}; set --bos")
    prompts = _prompts(config, student, tokenizer, bos)
    student.prepare(prompts)
    sequences = config.sequences or (len(prompts.given_PL) if config.prompts else _BARE)
    request = {
        "format_version": samples.FORMAT_VERSION, "model": student.identity, "decoding": student.settings(), "seed": str(config.seed),
        "given": tables.digest(prompts.given_PL.numpy()), "lengths": tables.digest(prompts.length_P.numpy()), "sequences": sequences,
    }  # fmt: skip
    path = tables.piece(Path(config.output) / "samples", f"{Path(config.student).name}-{student.label}", request)
    progress = Progress(sequences)
    progress.begin(Path(config.student).name)

    def draw(sequence_id_B: Tensor) -> dict[str, Array]:
        given_BL, length_B = prompts.rows(sequence_id_B)
        ids_BL, length_B, nfe_B = student(given_BL, length_B, sequence_id_B)
        columns = {"input_ids": ids_BL, "length": length_B, "nfe": nfe_B}
        return {name: column.cpu().numpy().astype(np.int32) for name, column in columns.items()}

    columns = samples.obtain_columns(path, request, sequences, config.batch, draw, progress.advance)
    progress.close()
    return SampleSet(path, tokenizer, student.vocab_size, columns, student.asked)


def _prompts(config: SampleConfig, student: Writer, tokenizer: Any, bos: int) -> Prompts:
    length = config.length or student.longest
    if not 2 <= length <= student.longest:
        raise ValueError(f"length is {length}, and {student.limit} takes rows of 2 to {student.longest} positions, BOS included; set --length")
    try:
        return Prompts.read(Path(config.prompts), tokenizer, bos, student.vocab_size, length) if config.prompts else Prompts.bare(bos, length)
    except DatasetError as error:
        more = f" ({student.limit} takes rows of at most {student.longest})" if length == student.longest else ""
        raise DatasetError(f"{error}{more}") from None


def _tokenizer_of(config: SampleConfig, student: Writer) -> str:
    if config.tokenizer or student.tokenizer:
        return config.tokenizer or student.tokenizer
    raise DatasetError(f"the dataset that {config.student} was trained on, with its tokenizer/, is not here; set --tokenizer")
