"""How many bytes does a token's noise take, and what is lost: the epsilon-sketch, top-k log-probs, dense fp16, the floor.

    python -m benchmarks.codec
    python -m benchmarks.codec --teacher runs/demo/teacher --dataset runs/demo/heldout

Every codec sees the same distributions and rebuilds the same draw of the same noise stream (draw 0):

* sketch: encoded, written as a shard in a temporary folder and read back from it. Bytes are that file's, everything included.
* top-k: ids and fp16 log-probs of the k likeliest entries, the realised token's float32; the mass outside is shared over
  all other entries, evenly or like the corpus unigram (what of a reader's knowledge suits it best). Bytes by arithmetic.
* dense fp16: every entry's log-prob. Bytes by arithmetic.

Written beside the figures: total variation between softmax(g) and softmax(g decoded), the worst error of an entry of g in
nats, and for the sketch what its kept entries would cost an ideal coder (`benchmarks/floor.py`). About a minute on one core.
Shapes: N positions, V vocabulary, K kept entries, B rows, L block length.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import floor, results, teachers
from benchmarks.teachers import Distributions
from noise import philox
from noise.compiled import compiled
from noise.decode import decode
from noise.posterior import posterior_gumbel
from noise.shard import FORMAT_VERSION, ROWS_PER_BATCH, Rows, ShardMetadata, ShardReader, ShardWriter
from noise.sketch import Codec, Sketch, encode, select
from pipeline import estimate

CHUNK = 32  # positions at a time
Figures = dict[str, Any]


@dataclass
class Config:
    """What is measured, on which distributions."""

    vocab_size: int = 50257
    """Of the simulated teacher."""
    positions: int = 256
    """Of the simulated teacher; as many again are what the floor's coder learns from."""
    teacher: str = ""
    """Folder of a causal LM to measure as well; empty: the simulated one alone."""
    dataset: str = ""
    """Dataset whose rows the causal LM reads, with its tokenizer."""
    teacher_positions: int = 2048
    """Of the causal LM; as many again are learned from."""
    epsilons: list[float] = field(default_factory=lambda: [0.03125, 0.0625, 0.125, 0.25, 0.5])
    """Of sketches with one draw."""
    draws: list[int] = field(default_factory=lambda: [4, 16])
    """Of sketches at epsilon 1/8."""
    top_k: list[int] = field(default_factory=lambda: [16, 50, 64, 256])
    """Entries kept by top-k."""
    block_length: int = 1024
    """Of the shard that is written: positions a row."""
    seed: int = 1
    """Of the simulated teacher and of the noise stream."""
    output: str = "benchmarks/results/codec.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        if bool(self.teacher) != bool(self.dataset):
            raise ValueError(f"teacher is {self.teacher!r} and dataset is {self.dataset!r}; give both or neither")
        if min(self.positions, self.teacher_positions) < 1:
            raise ValueError(f"positions is {self.positions}, teacher_positions {self.teacher_positions}; both must be at least 1")

    def codecs(self, vocab_size: int) -> list[Codec]:
        return [Codec(vocab_size, epsilon) for epsilon in self.epsilons] + [Codec(vocab_size, 0.125, draws) for draws in self.draws]


def format_bytes(codec: Codec, kept: float, block_length: int) -> float:
    """Bytes a position with noise by arithmetic from the format (pipeline/estimate.py); L - 1 positions of a row have noise."""
    metadata = metadata_of(codec, block_length)
    return estimate.row_bytes(metadata) / (block_length - 1) + kept * estimate.entry_bytes(metadata)


def entry_bytes(codec: Codec) -> int:
    """Of one kept entry."""
    return estimate.entry_bytes(metadata_of(codec, 2))


def metadata_of(codec: Codec, block_length: int, seed: int = 1) -> ShardMetadata:
    """A shard of the current format, of no dataset."""
    return ShardMetadata(FORMAT_VERSION, str(seed), codec.epsilon, codec.step, codec.draws, codec.vocab_size, block_length, "parallel", 0, "0" * 64)


def measure(source: Distributions, config: Config) -> Figures:
    """All codecs on one teacher's distributions."""
    places_N5 = _places(len(source.token_N), config)
    beliefs = {
        "pooled": floor.Beliefs.learn(source.learn_MV, torch.zeros(source.vocab_size, dtype=torch.int64)),
        "by_frequency": floor.Beliefs.learn(source.learn_MV, floor.frequency_classes(source.unigram_V)),
    }
    methods: list[tuple[Figures, Callable[[slice], Tensor]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for codec in config.codecs(source.vocab_size):
            methods.append(_sketched(source, places_N5, codec, config, beliefs, Path(folder) / "shard.arrow"))
        for k in config.top_k:
            if k < source.vocab_size:
                methods += [_top_k(source, places_N5, k, tail) for tail in ("even", "unigram")]
        methods.append(_dense(source, places_N5))
        _compare(source, places_N5, methods)
    return {"teacher": source.about, "vocab_size": source.vocab_size, "positions": len(source.token_N), **source.shape(),
            "codecs": [figures for figures, _ in methods]}  # fmt: skip


def _places(count: int, config: Config) -> Tensor:
    """Positions 1..L-1 of row 0, then of row 1, ..."""
    at_N = torch.arange(count)
    noisy = config.block_length - 1
    return philox.rows(config.seed, at_N // noisy, 1 + at_N % noisy)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


posterior = compiled(posterior_gumbel)


def _compare(source: Distributions, places_N5: Tensor, methods: list[tuple[Figures, Callable[[slice], Tensor]]]) -> None:
    """Add to each method's figures: mean and worst total variation of softmax(g), worst error of an entry of g."""
    for figures, _ in methods:
        figures |= {"total_variation": 0.0, "worst_total_variation": 0.0, "worst_error": 0.0}
    for part in _chunks(len(source.token_N)):
        g_nV = posterior(source.log_probs_NV[part], source.token_N[part], places_N5[part])
        share_nV = g_nV.softmax(1)
        for figures, decoded in methods:
            decoded_nV = decoded(part)
            distance_n = (decoded_nV.softmax(1) - share_nV).abs().sum(1) / 2
            figures["total_variation"] += float(distance_n.sum()) / len(source.token_N)
            figures["worst_total_variation"] = max(figures["worst_total_variation"], float(distance_n.max()))
            figures["worst_error"] = max(figures["worst_error"], float((decoded_nV - g_nV).abs().max()))


def _sketched(
    source: Distributions, places_N5: Tensor, codec: Codec, config: Config, beliefs: dict[str, floor.Beliefs], path: Path
) -> tuple[Figures, Callable[[slice], Tensor]]:
    """Encode, write a shard, read it back; what it cost, what it would cost an ideal coder, and its decoder."""
    count, parts, expected = len(source.token_N), [], 0.0
    ideal = {name: {"which": 0.0, "codes": 0.0} for name in beliefs}
    for part in _chunks(count):
        log_probs_nV, token_n = source.log_probs_NV[part], source.token_N[part]
        parts.append(encode(log_probs_nV, token_n, places_N5[part], codec))
        chance_nV = -torch.expm1(-codec.draws * torch.log1p(log_probs_nV.double().exp() / codec.c))
        expected += float(chance_nV.sum() - chance_nV.gather(1, token_n[:, None]).sum())
        nats_nV = floor.thresholds(places_N5[part], codec)
        for name, belief in beliefs.items():
            for kind, bits in zip(("which", "codes"), floor.bits(log_probs_nV, token_n, nats_nV, codec, belief), strict=True):
                ideal[name][kind] += bits / count
    sketch = Sketch(*(torch.cat(tensors) for tensors in zip(*(part.tensors() for part in parts), strict=True)))
    size = write_shard(path, sketch, source.token_N, codec, config)
    stored = read_shard(path, count)
    kept = len(sketch.index_K) / count
    figures: Figures = {
        "codec": "sketch", "epsilon": codec.epsilon, "draws": codec.draws, "bytes": size,
        "format_bytes": format_bytes(codec, kept, config.block_length), "kept": kept, "expected_kept": expected / count,
        "bound_kept": codec.expected_kept_bound, "entry_bytes": kept * entry_bytes(codec), "ideal_bits": ideal,
    }  # fmt: skip
    at_N = torch.arange(count)
    return figures, lambda part: decode(select(stored, at_N[part]), source.token_N[part], places_N5[part], codec)


def write_shard(path: Path, sketch: Sketch, token_N: Tensor, codec: Codec, config: Config) -> float:
    """Write one full record batch in which the N positions repeat; bytes of the file a position with noise."""
    noisy = config.block_length - 1
    total = max(ROWS_PER_BATCH, -(-len(token_N) // noisy)) * noisy
    repeated = torch.arange(total) % len(token_N)
    whole = select(sketch, repeated)

    def column(values: Tensor, kind: str) -> np.ndarray:
        return np.pad(values.reshape(-1, noisy).numpy(), ((0, 0), (1, 0))).astype(kind)

    kept_BL = column(whole.kept_N, "uint16")
    rows = Rows(
        np.arange(len(kept_BL), dtype=np.uint64),
        column(token_N[repeated], "int32"),
        np.full(len(kept_BL), config.block_length, np.int32),
        column(whole.log_prob_N, "float32"),
        kept_BL,
        (whole.index_K.numpy().astype(f"uint{8 * codec.index_bytes}"), whole.code_K.numpy().astype(f"uint{8 * codec.code_bytes}")),
        np.concatenate([[0], np.cumsum(kept_BL.sum(1, dtype=np.int64))]),
    )
    with path.open("wb") as file:
        writer = ShardWriter(file, metadata_of(codec, config.block_length, config.seed))
        writer.add(rows)
        writer.close()
    return path.stat().st_size / total


def read_shard(path: Path, count: int) -> Sketch:
    """The first `count` positions with noise of a shard."""
    rows = Rows.concatenate(list(ShardReader(path)))
    kept_N = torch.from_numpy(rows.kept[:, 1:].reshape(-1)[:count].astype(np.int64))
    entries = slice(0, int(kept_N.sum()))
    index_K, code_K = (torch.from_numpy(values[entries].astype(np.int64)) for values in (rows.index, rows.code))
    return Sketch(torch.from_numpy(rows.log_prob[:, 1:].reshape(-1)[:count].copy()), kept_N, index_K, code_K)


def _top_k(source: Distributions, places_N5: Tensor, k: int, tail: str) -> tuple[Figures, Callable[[slice], Tensor]]:
    weight_V = torch.ones(source.vocab_size, dtype=torch.float64) if tail == "even" else source.unigram_V

    def decoded(part: slice) -> Tensor:
        log_probs_nV, token_n1 = source.log_probs_NV[part], source.token_N[part][:, None]
        top_nk, index_nk = log_probs_nV.topk(k, 1)
        kept_nk = top_nk.half().double().exp()
        weight_nV = weight_V.repeat(len(top_nk), 1).scatter(1, index_nk, 0.0)
        rest_n1 = (1 - kept_nk.sum(1, keepdim=True)).clamp_min(0.0)
        p_nV = (weight_nV * rest_n1 / weight_nV.sum(1, keepdim=True)).scatter(1, index_nk, kept_nk)
        known_nV = p_nV.log().float().scatter(1, token_n1, log_probs_nV.gather(1, token_n1))
        return posterior(known_nV, source.token_N[part], places_N5[part])

    size = 4 + 4 + k * (Codec(source.vocab_size).index_bytes + 2)
    return {"codec": "top-k", "k": k, "tail": tail, "bytes": size}, decoded


def _dense(source: Distributions, places_N5: Tensor) -> tuple[Figures, Callable[[slice], Tensor]]:
    def decoded(part: slice) -> Tensor:
        return posterior(source.log_probs_NV[part].half().float(), source.token_N[part], places_N5[part])

    return {"codec": "dense fp16", "bytes": 4 + 2 * source.vocab_size}, decoded


def run(config: Config) -> Figures:
    """Measure on every teacher that the config names, write the JSON, return its figures."""
    sources = [teachers.simulated(config.vocab_size, config.positions, config.positions, config.seed)]
    if config.teacher:
        sources.append(teachers.real(Path(config.teacher), Path(config.dataset), config.teacher_positions, config.teacher_positions))
    figures = {"teachers": {source.name: measure(source, config) for source in sources}}
    settings = {name: value for name, value in asdict(config).items() if name not in ("teacher", "dataset", "output")}
    results.write(Path(config.output), settings, figures)
    return figures


def show(name: str, figures: Figures) -> None:
    """Print one teacher's table."""
    title = (
        f"{name}: V = {figures['vocab_size']:,}, {figures['positions']:,} positions, entropy {figures['entropy']:.2f} nats, "
        f"top {figures['top']:.2f}, outside 64 {figures['outside_64']:.3f}"
    )
    caption = "kept: measured (theory); entries: their bytes; ideal: the same for an ideal coder that knows the tail / each entry's frequency"
    columns = ("codec", "bytes a token", "kept", "total variation", "its worst", "worst error", "entries", "ideal")
    results.show(title, columns, [_cells(row) for row in figures["codecs"]], caption)


def _cells(row: Figures) -> list[str]:
    if row["codec"] == "sketch":
        ideal = " / ".join(f"{sum(bits.values()) / 8:.2f}" for bits in row["ideal_bits"].values())
        name = f"sketch {row['epsilon']:g}" + (f", {row['draws']} draws" if row["draws"] > 1 else "")
        about = (f"{row['kept']:.2f} ({row['expected_kept']:.2f})", f"{row['entry_bytes']:.2f}", ideal)
    else:
        name = f"top-{row['k']}, tail {row['tail']}" if row["codec"] == "top-k" else row["codec"]
        about = ("", "", "")
    loss = (f"{row['total_variation']:.5f}", f"{row['worst_total_variation']:.4f}", f"{row['worst_error']:.4f}")
    return [name, f"{row['bytes']:,.2f}", about[0], *loss, *about[1:]]


def _measure_and_show(config: Config) -> None:
    for name, figures in run(config)["teachers"].items():
        show(name, figures)


def main(arguments: list[str] | None = None) -> int:
    return results.command("codec", __doc__ or "", Config, _measure_and_show, arguments)


if __name__ == "__main__":
    sys.exit(main())
