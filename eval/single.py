"""One student at a time: its samples, their perplexity, its reconstruction of held-out rows."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eval.ahead import ordered
from eval.cautions import cautions_of_one
from eval.config import PerplexityConfig, ReconstructConfig, SampleConfig, System
from eval.decoding import Decoding
from eval.judge import Judge
from eval.metrics import Scored, bootstrap_weights, mean
from eval.page import interval
from eval.progress import Progress
from eval.reconstruct import by_position, returned, shares
from eval.report import figures
from eval.sample_set import sample_set
from eval.show import show_figures, show_notes, show_texts
from eval.study import device_of
from eval.systems import check_bare, check_nfe, is_free, load
from noise.storage import DatasetError
from trainer.data import NoiseDataset


def sample_one(config: SampleConfig) -> None:
    """Sample, or find the samples that the same request made before; print some and say where all are."""
    found = sample_set(config)
    show_texts(found.texts(config.shown))
    print(f"NFE: {found.made}\nsamples: {found.path}")


def perplexity_one(config: PerplexityConfig) -> None:
    """Sample as above, then judge."""
    if not config.judge:
        raise ValueError("judge is empty; give a causal LM that did not make the noise: --judge FOLDER_OR_HUB_ID")
    drawn = sample_set(config)
    ids_SL, length_S = drawn.columns["input_ids"], drawn.columns["length"]
    judge = Judge(config.judge, drawn.tokenizer, drawn.vocab_size, device_of(config.device))
    weights_RS = bootstrap_weights(len(ids_SL), config.replicates, config.seed)
    ends = {int(ids_SL[0, 0]), drawn.tokenizer.eos_token_id} - {None}
    found = figures(Scored(ids_SL, length_S, *judge.score(ids_SL, length_S)), weights_RS, ends)
    show_figures({
        "perplexity" + (" (text in the judge's tokens)" if judge.retokenises else ""): interval(found["perplexity"], 2),
        "entropy, nats a token": interval(found["entropy"], 3), "entropy in a sequence": interval(found["sequence_entropy"], 3),
        **{f"distinct-{n}": interval(found[f"distinct_{n}"], 3) for n in (1, 2, 3)},
        **{f"repeated {n}-grams in a row": interval(found[f"repeated_{n}"], 3) for n in (2, 3, 4)},
        "tokens in loops": interval(found["looped"], 4), "tokens before an end": interval(found["length"]["mean"]),
        "sequences": str(len(ids_SL)), "NFE": drawn.made,
    })  # fmt: skip
    show_notes(cautions_of_one(Path(config.student), judge.lm.identity))
    print(f"samples: {drawn.path}")


def reconstruct_one(config: ReconstructConfig) -> None:
    """Print the share of held-out tokens that come back from their noise, by NFE, and in each part of the row."""
    student, dataset = _masked(config), NoiseDataset(config.heldout)
    order = ordered(student, "even", config.order)
    if (student.vocab_size, student.block_length) != (dataset.codec.vocab_size, dataset.block_length):
        raise DatasetError(
            f"{config.student} has vocabulary {student.vocab_size} and block length {student.block_length}, {config.heldout} has "
            f"{dataset.codec.vocab_size} and {dataset.block_length}; give held-out rows of the student's kind"
        )
    if config.rows < 1:
        raise ValueError(f"rows is {config.rows}; it must be at least 1")
    progress = Progress(config.rows * sum(config.nfe))
    found = {}
    for nfe in config.nfe:
        progress.begin(f"NFE {nfe}")
        count = functools.partial(progress.advance, each=nfe)
        same_SL = returned(student, dataset, config.rows, nfe, order, config.seed, device_of(config.device), count)
        weights_RS = bootstrap_weights(len(same_SL), config.replicates, config.seed)
        found[f"NFE {nfe}"] = interval(asdict(mean(shares(same_SL), weights_RS)), 4)
        for part in by_position(same_SL, weights_RS, most=4):
            found[f"NFE {nfe}, positions {part['first']} to {part['last']}"] = interval(part["share"], 4)
    progress.close()
    show_figures(found)


def _masked(config: ReconstructConfig) -> Any:
    """The student. Raises DatasetError for one that does not turn noise into rows, ValueError for numbers of forwards that it cannot make."""
    system = System(config.student, nfe=config.nfe)
    student = load(config.student, replace(system, nfe=[]), device_of(config.device))
    if is_free(system, student):
        raise DatasetError(
            f"{config.student} holds a student of kind {student.config.kind}, which reveals no masked positions; give one of kind mdlm, bd3lm or mtp"
        )
    check_nfe(config.student, system, student, config.nfe)
    for nfe in config.nfe if student.ahead else ():
        check_bare(config.student, student, Decoding(nfe, order=ordered(student, "even", config.order)))
    return student
