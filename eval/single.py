"""One student at a time: its samples, their perplexity, its reconstruction of held-out rows."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import samples, tables
from eval.causal import folder_identity, load_tokenizer
from eval.config import PerplexityConfig, ReconstructConfig, SampleConfig
from eval.judge import Judge
from eval.metrics import Array, Interval, Scored, bootstrap_weights
from eval.page import interval
from eval.progress import Progress
from eval.reconstruct import reconstruct
from eval.report import figures
from eval.sampler import Decoding, resolve_output
from eval.show import show_figures, show_texts
from eval.study import device_of, draw_rows, load_masked, sample_request
from noise.storage import DatasetError
from trainer.data import NoiseDataset


def sample_one(config: SampleConfig) -> None:
    """Sample, or find the samples that the same request made before; print some and say where all are."""
    _, tokenizer, path, ids_SL = _samples(config)
    show_texts([tokenizer.decode(row[1:].tolist()) for row in ids_SL[: config.shown]])
    print(f"samples: {path}")


def perplexity_one(config: PerplexityConfig) -> None:
    """Sample as above, then judge."""
    if not config.judge:
        raise ValueError("judge is empty; give a causal LM that did not make the noise: --judge FOLDER_OR_HUB_ID")
    student, tokenizer, path, ids_SL = _samples(config)
    judge = Judge(config.judge, tokenizer, student.vocab_size, device_of(config.device))
    length_S = np.full(len(ids_SL), ids_SL.shape[1])
    found = figures(Scored(ids_SL, length_S, *judge.score(ids_SL, length_S)), bootstrap_weights(len(ids_SL), config.replicates, config.seed))
    show_figures({
        "perplexity" + (" (text in the judge's tokens)" if judge.retokenises else ""): interval(found["perplexity"], 2),
        "entropy, nats a token": interval(found["entropy"], 3), "entropy in a sequence": f"{found['sequence_entropy']:.3f}",
        **{f"distinct-{n}": f"{found[f'distinct_{n}']:.3f}" for n in (1, 2, 3)}, "sequences": str(len(ids_SL)), "NFE": str(config.nfe),
    })  # fmt: skip
    print(f"samples: {path}")


def reconstruct_one(config: ReconstructConfig) -> None:
    """Print the share of held-out tokens that come back from their noise, by NFE."""
    student, dataset = load_masked(config.student, device_of(config.device)), NoiseDataset(config.heldout)
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
        share_S = reconstruct(student, dataset, config.rows, nfe, config.order, config.seed, device_of(config.device), count)
        weights = bootstrap_weights(len(share_S), config.replicates, config.seed)
        found[f"NFE {nfe}"] = interval(asdict(Interval.of(weights @ share_S / len(share_S))), 4)
    progress.close()
    show_figures(found)


def _samples(config: SampleConfig) -> tuple[Any, Any, Path, Array]:
    """(student, tokenizer, where the samples are, tokens int32 [S, L])."""
    device = device_of(config.device)
    student = load_masked(config.student, device)
    tokenizer = load_tokenizer(_tokenizer_folder(config, student))
    bos = config.bos if config.bos >= 0 else tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None or not 0 <= bos < student.vocab_size:
        raise ValueError(f"BOS is {bos}, not a token of the student's vocabulary of {student.vocab_size}; set --bos")
    decoding = Decoding(
        config.nfe, config.temperature, config.noise_temperature, config.nucleus, resolve_output(config.choose, student), config.order
    )
    request = sample_request(folder_identity(Path(config.student)), asdict(decoding), config.seed, bos, student.block_length, config.sequences)
    path = tables.piece(Path(config.output) / "samples", f"{Path(config.student).name}-nfe{config.nfe}", request)
    progress = Progress(config.sequences)
    progress.begin(f"NFE {config.nfe}")

    def draw(sequence_id_B: Tensor) -> Tensor:
        return draw_rows(student, decoding, config.seed, bos, device, torch.as_tensor(sequence_id_B))

    ids_SL = samples.obtain(path, request, config.sequences, config.batch, draw, progress.advance)
    progress.close()
    return student, tokenizer, path, ids_SL


def _tokenizer_folder(config: SampleConfig, student: Any) -> str:
    if config.tokenizer:
        return config.tokenizer
    dataset = student.provenance.get("dataset")
    if dataset and (Path(dataset) / "tokenizer").is_dir():
        return str(Path(dataset) / "tokenizer")
    raise DatasetError(f"{config.student} was trained on {dataset}, which has no tokenizer/ here; set --tokenizer")
