"""How should a shard be laid out: bytes a token and read speed of format versions 1 and 2, and of what was not taken.

    python -m benchmarks.layout
    python -m benchmarks.layout --vocab_size 151936 --output benchmarks/results/layout-151936.json
    python -m benchmarks.layout --teacher runs/demo/teacher --dataset runs/demo/heldout

The same rows are written as an Arrow file in every layout; bytes are the file's, everything included. Reading is what the
trainer does: rows in random order from the mapped file, widened to the types it computes with, after a warm-up, as a
ratio to version 1 measured in turn with it. `once` opens the file anew and takes its rows in order, where compression is paid.
`held` is the memory that the views of an opened file keep: nothing where it is mapped.

Rows are simulated (`benchmarks/rows.py`), or a real dataset's as they are. The floor is an ideal coder's (`benchmarks/floor.py`,
each entry's frequency known), with ids at their unigram entropy and exact log-probs.
Shapes: B rows, L block length, N positions, V vocabulary, K kept entries.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks import entries, floor, results, rows, teachers
from benchmarks.teachers import Distributions
from noise import philox
from noise.shard import ROWS_PER_BATCH, ZSTD_LEVEL, Rows
from noise.sketch import Codec

Array = npt.NDArray[Any]
Figures = dict[str, Any]


@dataclass
class Config:
    """What is laid out."""

    vocab_size: int = 50257
    """Of the simulated teacher."""
    epsilon: float = 0.125
    """Of the sketch."""
    draws: int = 1
    """Of the sketch."""
    block_length: int = 1024
    """Positions a row of the simulated teacher."""
    distributions: int = 16384
    """Of the simulated teacher; the positions of a record batch share them, at random."""
    positions: int = 256
    """Measured for the floor and the ranks; as many again are what the floor's coder learns from."""
    teacher: str = ""
    """Folder of a causal LM for the floor of a dataset's rows; empty: simulated rows alone."""
    dataset: str = ""
    """Dataset of that teacher's, whose rows are laid out."""
    repeats: int = 30
    """Times that reading is timed; the fastest counts."""
    seed: int = 1
    """Of the simulated teacher and of what is drawn from it."""
    output: str = "benchmarks/results/layout.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        if bool(self.teacher) != bool(self.dataset):
            raise ValueError(f"teacher is {self.teacher!r} and dataset is {self.dataset!r}; give both or neither")
        if min(self.distributions, self.positions, self.repeats) < 1 or self.block_length < 2:
            raise ValueError("distributions, positions and repeats must be at least 1, block_length at least 2")


@dataclass(frozen=True)
class Layout:
    """Types of the columns, how entries are stored (`benchmarks/entries.py`), and compression of Arrow's buffers."""

    name: str
    input_ids: str
    kept: str
    entries: str = "columns"
    log_prob: str = "float32"
    compression: str | None = None


def layouts(codec: Codec) -> list[Layout]:
    """Version 1, its parts made narrower one after the other, and what else was thought of."""
    ids = "uint16" if codec.vocab_size <= 65536 else "int32"
    best = "packed" if codec.index_bytes == 4 and codec.code_bytes == 1 else "columns"
    found = [Layout("version 1", "int32", "uint16"), Layout("narrow ids and counts", ids, "uint8")]
    if codec.index_bytes == 4:
        found += [Layout("packed entries (version 2)", ids, "uint8", best), Layout("counts a 65,536 entries", ids, "uint8", "segments")]
    else:
        found[-1] = Layout("narrow ids and counts (version 2)", ids, "uint8")
    return [
        *found,
        Layout("+ float16 log-probs", ids, "uint8", best, "float16"),
        Layout("+ bit-packed entries", ids, "uint8", "bits"),
        Layout("+ index deltas in bytes", ids, "uint8", "deltas"),
        Layout("version 2, lz4", ids, "uint8", best, compression="lz4"),
        Layout(f"version 2, zstd {ZSTD_LEVEL}", ids, "uint8", best, compression=f"zstd {ZSTD_LEVEL}"),
        Layout("version 2, zstd 9", ids, "uint8", best, compression="zstd 9"),
        Layout(f"index deltas, zstd {ZSTD_LEVEL}", ids, "uint8", "deltas", compression=f"zstd {ZSTD_LEVEL}"),
    ]


def write(path: Path, laid: Rows, layout: Layout, codec: Codec) -> None:
    """An Arrow file of record batches of 64 rows."""
    writer = None
    with path.open("wb") as file:
        for start in range(0, len(laid), ROWS_PER_BATCH):
            part = laid[start : start + ROWS_PER_BATCH]
            columns = {"sequence_id": pa.array(part.sequence_id), "length": pa.array(part.length)}
            for name, kind in (("input_ids", layout.input_ids), ("log_prob", layout.log_prob)):
                columns[name] = _fixed(getattr(part, name).astype(kind))
            kept, stored = entries.STORE[layout.entries](part, codec)
            assert kept.max(initial=0) <= np.iinfo(layout.kept).max
            columns["kept"] = _fixed(kept.astype(layout.kept))
            for name, (values, offset) in stored.items():
                columns[name] = pa.LargeListArray.from_arrays(pa.array(offset, pa.int64()), pa.array(values))
            batch = pa.RecordBatch.from_pydict(columns)
            if writer is None:
                kind, _, level = (layout.compression or "").partition(" ")
                codec_of_buffers = pa.Codec(kind, int(level) if level else None) if kind else None
                options = pa.ipc.IpcWriteOptions(compression=codec_of_buffers)
                writer = pa.ipc.new_file(pa.PythonFile(file, mode="w"), batch.schema, options=options)
            writer.write_batch(batch)
        assert writer is not None
        writer.close()


def _fixed(values_BX: Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values_BX.reshape(-1)), values_BX[0].size)


class Reader:
    """Views of an opened file's columns, and rows gathered from them as the trainer computes with them."""

    def __init__(self, path: Path, layout: Layout, codec: Codec):
        self._layout, self._codec = layout, codec
        before = pa.total_allocated_bytes()
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [self._views(file.get_batch(number)) for number in range(file.num_record_batches)]
        self.held = pa.total_allocated_bytes() - before

    @staticmethod
    def _views(batch: pa.RecordBatch) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_large_list(column.type):
                found[name] = (column.values.to_numpy(), column.offsets.to_numpy())
            elif pa.types.is_fixed_size_list(column.type):
                found[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
            else:
                found[name] = column.to_numpy()
        return found

    def rows(self, row_B: Array) -> tuple[Array, ...]:
        """(input_ids [B, L], length [B], log_prob [B, L], kept [B, L], index [K], code [K]) of rows, int64 and float32."""
        at = [(self._batches[row // ROWS_PER_BATCH], row % ROWS_PER_BATCH) for row in row_B]
        ids, log_prob, kept = (np.stack([batch[name][i] for batch, i in at]) for name in ("input_ids", "log_prob", "kept"))
        lists: dict[str, tuple[Array, Array]] = {}
        for name, value in self._batches[0].items():
            if isinstance(value, tuple):
                spans = [batch[name][0][batch[name][1][i] : batch[name][1][i + 1]] for batch, i in at]
                lists[name] = (np.concatenate(spans), np.cumsum([0] + [len(span) for span in spans]))
        length = np.array([batch["length"][i] for batch, i in at])
        kept_BL, index_K, code_K = entries.LOAD[self._layout.entries](kept, lists, self._codec)
        return ids.astype(np.int64), length, log_prob.astype(np.float32), kept_BL, index_K, code_K


def measure(laid: Rows, codec: Codec, config: Config) -> list[Figures]:
    """Bytes and read speed of every layout; every one must give the rows back."""
    found: list[Figures] = []
    shuffled: list[Callable[[], object]] = []
    once: list[Callable[[], object]] = []
    noise = int(laid.length.sum(dtype=np.int64)) - len(laid)
    order_B = np.random.default_rng(config.seed).permutation(len(laid))
    expected = (laid.input_ids, laid.length, laid.log_prob, laid.kept, laid.index, laid.code)
    with tempfile.TemporaryDirectory() as folder:
        for number, layout in enumerate(layouts(codec)):
            path = Path(folder) / f"{number}.arrow"
            write(path, laid, layout, codec)
            reader = Reader(path, layout, codec)
            for ours, theirs in zip(reader.rows(np.arange(len(laid))), expected, strict=True):
                exact = layout.log_prob == "float32" or ours.dtype != np.float32
                assert np.array_equal(ours, theirs) if exact else np.allclose(ours, theirs, rtol=2**-11), layout
            shuffled.append(lambda reader=reader: [reader.rows(part) for part in np.array_split(order_B, -(-len(order_B) // 32))])
            once.append(lambda path=path, layout=layout: Reader(path, layout, codec).rows(np.arange(len(laid))))
            found.append({**asdict(layout), "bytes": path.stat().st_size / noise, "held": reader.held / noise})
        for kind, actions in (("shuffled", shuffled), ("once", once)):
            seconds = timed(actions, config.repeats)
            for figures, mine in zip(found, seconds, strict=True):
                figures[kind] = seconds[0] / mine
                figures[f"{kind}_rows_per_second"] = len(laid) / mine
    return found


def timed(actions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Least seconds of each, taken in turn after one round of warm-up: what else the machine does only ever adds."""
    seconds = np.empty((repeats + 1, len(actions)))
    for repeat in range(repeats + 1):
        for number, action in enumerate(actions):
            began = time.perf_counter()
            action()
            seconds[repeat, number] = time.perf_counter() - began
    return [float(least) for least in seconds[1:].min(axis=0)]


def ideal(source: Distributions, codec: Codec, config: Config) -> Figures:
    """The floor of the same teacher's entries, bytes a token, and what their ranks by E would take."""
    count = len(source.token_N)
    at_N = torch.arange(count)
    places_N5 = philox.rows(config.seed, at_N // 1023, 1 + at_N % 1023)
    bits = {"which": 0.0, "codes": 0.0}
    classes = floor.frequency_classes(source.unigram_V)
    beliefs = floor.Beliefs.learn(source.learn_MV, classes)
    for start in range(0, count, 32):
        part = slice(start, start + 32)
        nats_nV = floor.thresholds(places_N5[part], codec)
        for kind, value in zip(bits, floor.bits(source.log_probs_NV[part], source.token_N[part], nats_nV, codec, beliefs), strict=True):
            bits[kind] += value / count
    token_bits = float(-source.unigram_V[source.token_N].log2().mean())
    return {
        "ideal_bits": bits, "token_bits": token_bits, "bytes": 4 + (token_bits + sum(bits.values())) / 8, **entries.ranks(source, places_N5, codec)
    }  # fmt: skip


def run(config: Config) -> Figures:
    """Lay out the simulated rows and the dataset's, write the JSON, return its figures."""
    codec = Codec(config.vocab_size, config.epsilon, config.draws)
    source = teachers.simulated(config.vocab_size, config.positions, config.positions, config.seed)
    found = {"simulated": _figures(rows.simulated(codec, config.block_length, config.distributions, config.seed), source, codec, config)}
    if config.teacher:
        laid, codec = rows.of_dataset(Path(config.dataset))
        source = teachers.real(Path(config.teacher), Path(config.dataset), config.positions, config.positions)
        found["real"] = _figures(laid, source, codec, config)
    settings = {name: value for name, value in asdict(config).items() if name not in ("teacher", "dataset", "output")}
    results.write(Path(config.output), settings, {"rows": found})
    return found


def _figures(laid: Rows, source: Distributions, codec: Codec, config: Config) -> Figures:
    noise = int(laid.length.sum(dtype=np.int64)) - len(laid)
    return {
        "vocab_size": codec.vocab_size, "rows": len(laid), "block_length": laid.input_ids.shape[1], "positions": noise,
        "kept": len(laid.entries[0]) / noise, "layouts": measure(laid, codec, config), "floor": ideal(source, codec, config), "teacher": source.about,
    }  # fmt: skip


def show(name: str, figures: Figures) -> None:
    """Print one table."""
    lowest = figures["floor"]
    title = (
        f"{name}: V = {figures['vocab_size']:,}, {figures['rows']:,} rows of {figures['block_length']:,}, {figures['kept']:.2f} entries kept a token"
    )
    caption = (
        f"speeds are ratios to version 1's; an entry's rank by E: {lowest['rank_bytes']:.2f} bytes a token where its index takes "
        f"{lowest['index_bytes']:.2f}, and ordering the V words of a position takes {lowest['rank_cost']:.1f} times as long as making them"
    )
    rows = [[row["name"], *(f"{row[of]:.2f}" for of in ("bytes", "shuffled", "once", "held"))] for row in figures["layouts"]]
    rows.append(["floor", f"{lowest['bytes']:.2f}", "", "", ""])
    results.show(title, ("layout", "bytes a token", "shuffled", "once", "held"), rows, caption)


def _measure_and_show(config: Config) -> None:
    for name, figures in run(config).items():
        show(name, figures)


def main(arguments: list[str] | None = None) -> int:
    return results.command("layout", __doc__ or "", Config, _measure_and_show, arguments)


if __name__ == "__main__":
    sys.exit(main())
