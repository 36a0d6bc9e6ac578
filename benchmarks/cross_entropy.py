"""How well do stored bytes stand for the teacher in token-level distillation: kept entries, samples, top-k, at equal bytes.

    python -m benchmarks.cross_entropy
    python -m benchmarks.cross_entropy --teacher runs/demo/teacher --dataset runs/demo/heldout

Each estimator puts weights w in the place of the teacher's p, in the loss `sum w_i l_i` (l = -log q of a student) and in its
gradient `(sum w) q - w` with respect to the student's logits:

* kept: `noise.estimate` on the sketch's entries, with the student's entropy as control value b; also with b = 0.
* sampled: k tokens drawn from p, each with weight 1/k: unbiased, but its bytes buy nothing else.
* top-k: the k likeliest entries with their exact p; truncated, renormalised, or with the rest spread evenly over the others.

k is what the one-draw sketch's bytes pay for, rounded up: the token's id, then a sample's id each, or an id and a 2-byte log-prob.
Error of a token: estimate - truth; its mean is the bias, its deviation is over positions and noise. Both are exact for the
positions measured (`benchmarks/estimators.py`); figures in brackets are measured over real encodings. Errors of the mean
gradient are relative to the length (root mean square) of one position's.
The student `near` is the teacher's logits with an error of 0.5 nats for each entry everywhere and 0.5 at each position;
`tempered` is the teacher at temperature 1.5; `unigram` knows frequencies alone. About three minutes on one core.
Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import results, teachers
from benchmarks.codec import format_bytes
from benchmarks.estimators import MEANS, TAILS, Account, Figures, Student, Weights, columns, kept_weights, sampled_weights, top_k_weights
from benchmarks.teachers import Distributions
from noise import estimate, philox
from noise.sketch import Codec, encode

CHUNK = 32  # positions at a time


@dataclass
class Config:
    """What is measured, on which distributions."""

    vocab_sizes: list[int] = field(default_factory=lambda: [50257, 151936])
    """Of the simulated teachers."""
    positions: int = 128
    """Of each simulated teacher."""
    teacher: str = ""
    """Folder of a causal LM to measure as well; empty: the simulated ones alone."""
    dataset: str = ""
    """Dataset whose rows the causal LM reads, with its tokenizer."""
    teacher_positions: int = 2048
    """Of the causal LM."""
    epsilon: float = 0.125
    """Of every sketch."""
    draws: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128])
    """Of the sketches."""
    top_k: list[int] = field(default_factory=lambda: [64, 256])
    """Entries of top-k besides what equal bytes pay for."""
    encodings: int = 32
    """Draws encoded at each position to measure a sketch; at least one encoding, of all its draws."""
    block_length: int = 1024
    """Positions a row, for the bytes."""
    seed: int = 1
    """Of the simulated teacher, the students and the noise stream."""
    output: str = "benchmarks/results/cross_entropy.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        if bool(self.teacher) != bool(self.dataset):
            raise ValueError(f"teacher is {self.teacher!r} and dataset is {self.dataset!r}; give both or neither")
        if min(self.positions, self.teacher_positions) < 2:
            raise ValueError(f"positions is {self.positions}, teacher_positions {self.teacher_positions}; both must be at least 2")


def estimators(source: Distributions, config: Config) -> list[Figures]:
    """What is compared, with the bytes of each; `kept` is the expectation for the tokens as they are."""
    codecs = [Codec(source.vocab_size, config.epsilon, draws) for draws in dict.fromkeys([1, *config.draws])]
    found = [{"estimator": "kept", "draws": codec.draws, "expected_kept": expected_kept(source, codec)} for codec in codecs]
    for row, codec in zip(found, codecs, strict=True):
        row["bytes"] = format_bytes(codec, row["expected_kept"], config.block_length)
    index = codecs[0].index_bytes
    budget = found[0]["bytes"] - index
    k = math.ceil(budget / index)
    found += [found[0] | {"estimator": "kept, b = 0"}, {"estimator": "sampled", "k": k, "bytes": index + k * index}]
    for k in dict.fromkeys([math.ceil(budget / (index + 2)), *config.top_k]):
        if k < source.vocab_size:
            found += [{"estimator": "top-k", "k": k, "tail": tail, "bytes": index + k * (index + 2)} for tail in TAILS]
    return found


def expected_kept(source: Distributions, codec: Codec) -> float:
    """Entries a position, by the theorem."""
    total = 0.0
    for log_p_V, token in zip(source.log_probs_NV, source.token_N.tolist(), strict=True):
        pi_V = estimate.inclusion(log_p_V.double().exp(), codec)
        total += float(pi_V.sum() - pi_V[token])
    return total / len(source.token_N)


def position(p_V: Tensor, token: int, students: list[Student], rows: list[Figures], epsilon: float) -> list[Weights]:
    """Every estimator's weights at one position."""
    column_VC, found = columns(students), []
    for row in rows:
        if row["estimator"] == "kept":
            found.append(kept_weights(p_V, token, column_VC, Codec(len(p_V), epsilon, row["draws"])))
        elif row["estimator"] == "kept, b = 0":
            found.append(replace(found[0], controlled=False))
        elif row["estimator"] == "sampled":
            found.append(sampled_weights(p_V, column_VC, row["k"]))
        else:
            found.append(top_k_weights(p_V, column_VC, row["k"], row["tail"]))
    return found


def students_of(source: Distributions, seed: int) -> dict[str, Tensor]:
    """Log-probs float32 [N, V] of the students."""
    random = torch.Generator().manual_seed(seed)
    everywhere_V = 0.5 * torch.randn(source.vocab_size, generator=random)
    here_NV = 0.5 * torch.randn(source.log_probs_NV.shape, generator=random)
    return {
        "near": (source.log_probs_NV + everywhere_V + here_NV).log_softmax(1),
        "tempered": (source.log_probs_NV / 1.5).log_softmax(1),
        "unigram": source.unigram_V.log().float().expand_as(source.log_probs_NV),
    }


def measured(source: Distributions, log_q: dict[str, Tensor], codec: Codec, config: Config) -> Figures:
    """Through the real encoder: kept entries a position, and each student's root mean square error of one token."""
    repeats, kept, square = max(1, config.encodings // codec.draws), 0, dict.fromkeys(log_q, 0.0)
    for start in range(0, len(source.token_N), CHUNK):
        part = slice(start, start + CHUNK)
        log_probs_nV, token_n = source.log_probs_NV[part], source.token_N[part]
        p_nV = log_probs_nV.double().exp()
        for repeat in range(repeats):
            places_n5 = philox.rows(config.seed, torch.full_like(token_n, repeat), start + 1 + torch.arange(len(token_n)))
            sketch = encode(log_probs_nV, token_n, places_n5, codec)
            kept += len(sketch.index_K)
            for name, log_q_NV in log_q.items():
                found_n = estimate.cross_entropy(log_q_NV[part], token_n, sketch, codec).double()
                square[name] += float(((found_n + (p_nV * log_q_NV[part]).sum(1)) ** 2).sum())
    count = repeats * len(source.token_N)
    return {"kept": kept / count, "rmse": {name: (total / count) ** 0.5 for name, total in square.items()}}


def measure(source: Distributions, config: Config) -> Figures:
    """All estimators for all students of one teacher."""
    log_q, rows = students_of(source, config.seed), estimators(source, config)
    seen = [measured(source, log_q, Codec(source.vocab_size, config.epsilon, row["draws"]), config) for row in rows if row["estimator"] == "kept"]
    truth = [Account() for _ in log_q]
    accounts = [[Account() for _ in rows] for _ in log_q]
    for at, token in enumerate(source.token_N.tolist()):
        p_V = source.log_probs_NV[at].double().exp()
        students = [Student(log_q_NV[at].double().exp(), -log_q_NV[at].double()) for log_q_NV in log_q.values()]
        found = position(p_V, token, students, rows, config.epsilon)
        none = Weights(p_V, 0 * found[0].covariance_CC)
        for number, student in enumerate(students):
            truth[number].add(none, 0 * p_V, student, 1 + 2 * number)
            for account, weights in zip(accounts[number], found, strict=True):
                account.add(weights, p_V, student, 1 + 2 * number)
    figures: Figures = {}
    for number, name in enumerate(log_q):
        gradient = (truth[number].gradient_square / len(source.token_N)) ** 0.5
        table = [row | account.figures(gradient) for row, account in zip(rows, accounts[number], strict=True)]
        for row, through in zip(table, seen, strict=False):
            row |= {"kept": through["kept"], "measured_rmse": through["rmse"][name]}
        figures[name] = {"cross_entropy": float(np.mean(truth[number].error)), "gradient": gradient, "estimators": table}
    return {"teacher": source.about, "vocab_size": source.vocab_size, "positions": len(source.token_N), **source.shape(), "students": figures}


def run(config: Config) -> Figures:
    """Measure on every teacher that the config names, write the JSON, return its figures."""
    found = {f"simulated, V = {size:,}": measure(teachers.simulated(size, config.positions, 1, config.seed), config) for size in config.vocab_sizes}
    if config.teacher:
        found["real"] = measure(teachers.real(Path(config.teacher), Path(config.dataset), config.teacher_positions, 1), config)
    settings = {name: value for name, value in asdict(config).items() if name not in ("teacher", "dataset", "output")}
    results.write(Path(config.output), settings, {"teachers": found})
    return {"teachers": found}


def show(name: str, figures: Figures) -> None:
    """Print one teacher's tables, one for each student."""
    columns = ("estimator", "bytes", "kept", "bias", *(f"rmse {n:,}" for n in MEANS), *(f"gradient {n:,}" for n in MEANS[1:]))
    for student, found in figures["students"].items():
        title = f"{name}, entropy {figures['entropy']:.2f}; student {student}: cross-entropy {found['cross_entropy']:.3f} nats"
        caption = "rmse: of a mean over so many tokens (measured through the encoder); gradient: of the mean's, over a position's own length"
        results.show(title, columns, [_cells(row) for row in found["estimators"]], caption)


def _cells(row: Figures) -> list[str]:
    about = {"draws": f"R = {row.get('draws')}", "k": f"k = {row.get('k')}", "tail": row.get("tail", "")}
    name = ", ".join([row["estimator"], *(text for key, text in about.items() if key in row)])
    rmse = [f"{value:.4f}" for value in row["rmse"].values()]
    if "measured_rmse" in row:
        rmse[0] += f" ({row['measured_rmse']:.4f})"
    gradient = [f"{row['gradient_error'][str(n)]:.4f}" for n in MEANS[1:]]
    return [name, f"{row['bytes']:,.1f}", f"{row['kept']:.2f}" if "kept" in row else "", f"{row['bias']:+.4f}", *rmse, *gradient]


def _measure_and_show(config: Config) -> None:
    for name, figures in run(config)["teachers"].items():
        show(name, figures)


def main(arguments: list[str] | None = None) -> int:
    return results.command("cross_entropy", __doc__ or "", Config, _measure_and_show, arguments)


if __name__ == "__main__":
    sys.exit(main())
