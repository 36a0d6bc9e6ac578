"""How fast are batches read: ours, raw numpy memmap, and the peers, on the same rows, shuffled, from a warm page cache.

    python -m benchmarks.loader
    pip install --target peers --no-deps 'mosaicml-streaming==0.13.*' 'litdata==0.2.*'        and what they import; then PYTHONPATH=peers

Every reader gives the same columns as whole tensors: tokens, log-probs, counts, and the kept entries of every row. They are
measured in turn within rounds, so ratios compare neighbours in time. `stored` is in the widths of the shards (what goes to a GPU),
`int64` is what students on a CPU take. A reader with worker processes is measured with none and with two; the faster counts.

The first batch is timed in a process of its own that has imported the trainer, from opening a dataset of many small shards to
having a batch; with the files and maps that are open then. The order figures are those of a dataset of 10^8 rows.
Shapes: B rows, L block length, K kept entries.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine, results, rows
from benchmarks.loaders import READERS, Batch, Memmap, Ours
from noise.dataset import Manifest, Plan, root_hash
from noise.receipt import Totals, shard_name
from noise.shard import FORMAT_VERSION, Rows, ShardWriter
from noise.sketch import Codec
from noise.storage import sha256_file
from trainer.order import Order

Figures = dict[str, Any]


@dataclass
class Config:
    """What is read."""

    vocab_size: int = 50257
    """Of the simulated teacher."""
    block_lengths: list[int] = field(default_factory=lambda: [1024, 128])
    """Positions a row."""
    positions: int = 4_194_304
    """Of each dataset: rows times block length."""
    shards: int = 8
    """Of each dataset."""
    tokens_a_batch: int = 65_536
    """Positions a batch."""
    distributions: int = 1024
    """Of the simulated teacher; the rows of a dataset repeat 64 that are drawn from them."""
    seconds: float = 1.0
    """That each reader is measured in a round, after its first batches."""
    rounds: int = 5
    """Rounds; the median counts."""
    many_shards: int = 10_000
    """Of the dataset whose first batch is timed."""
    order_rows: int = 100_000_000
    """Of the dataset whose order is timed."""
    seed: int = 1
    """Of the simulated teacher."""
    output: str = "benchmarks/results/loader.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        if min(self.block_lengths, default=0) < 2 or self.positions < 64 * max(self.block_lengths) * self.shards:
            raise ValueError(f"positions is {self.positions}, block_lengths {self.block_lengths}; each shard needs 64 rows of at least 2 positions")


def write_dataset(folder: Path, base: Rows, codec: Codec, batches: int, shards: int) -> None:
    """A dataset of `shards` shards of so many record batches, each the base's rows in another order."""
    identity = {
        "format_version": FORMAT_VERSION, "vocab_size": codec.vocab_size, "block_length": base.input_ids.shape[1], "extraction": "parallel",
        "seed": "1", "epsilon": codec.epsilon, "draws": codec.draws,
    }  # fmt: skip
    plan = Plan(identity, {}, list(range(shards)))
    (folder / "shards").mkdir(parents=True)
    random = np.random.default_rng(1)
    receipts = []
    for shard in range(shards):
        metadata = plan.metadata(shard)
        totals, file = Totals(metadata), io.BytesIO()
        writer = ShardWriter(file, metadata)
        for number in range(batches):
            parts = [base[at : at + 1] for at in random.permutation(len(base)).tolist()]
            part = replace(Rows.concatenate(parts), sequence_id=np.arange(len(base), dtype=np.uint64) + np.uint64((shard << 32) + number * len(base)))
            writer.add(part)
            totals.add(part)
        writer.close()
        path = folder / "shards" / shard_name(shard)
        path.write_bytes(file.getvalue())
        receipts.append(totals.receipt(path.name, sha256_file(path), path.stat().st_size, 0))
    Manifest(identity, receipts, root_hash(identity, receipts)).save(folder, {})


def read(batches: Iterator[Batch], seconds: float) -> tuple[int, float]:
    """(rows, seconds) of reading on."""
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += len(next(batches)["length"])
    return count, time.perf_counter() - began


def check(name: str, batch: Batch, base: Rows) -> None:
    """Whether the rows of a batch are rows of the dataset: their tokens name them, and their entries follow."""
    row_of = {tuple(ids[:16].tolist()): at for at, ids in enumerate(base.input_ids)}
    stop_B = batch["kept"].to(torch.int64).sum(1).cumsum(0).tolist()
    for at, (start, stop) in enumerate(zip([0, *stop_B], stop_B, strict=False)):
        row = base[row_of[tuple(batch["input_ids"][at, :16].tolist())] :][:1]
        for column, found in (("input_ids", batch["input_ids"][at]), ("log_prob", batch["log_prob"][at]), ("kept", batch["kept"][at]),
                              ("index", batch["index"][start:stop]), ("code", batch["code"][start:stop])):  # fmt: skip
            expected = np.asarray(getattr(row, column)).reshape(-1)
            if not np.array_equal(found.numpy().astype(expected.dtype), expected):
                raise AssertionError(f"{name} gives another {column} than was written")


def measure(folder: Path, base: Rows, codec: Codec, config: Config) -> list[Figures]:
    """Rows a second of every reader that is installed, and of each relative to memmap in the same round."""
    length = base.input_ids.shape[1]
    size = max(1, config.tokens_a_batch // length)
    write_dataset(folder / "dataset", base, codec, config.positions // (length * len(base) * config.shards), config.shards)
    found: list[Figures] = []
    open_readers: list[tuple[Figures, Iterator[Batch]]] = []
    for kind in READERS:
        reader = kind()
        if not reader.available():
            found.append({"name": reader.name, "install": reader.install})
            continue
        own = folder / str(len(found))
        own.mkdir()
        reader.write(folder / "dataset", own)
        for wide in (False, True):
            for workers in reader.workers:
                batches = reader.batches(folder / "dataset", own, size, wide, workers)
                check(reader.name, next(batches), base)
                for _ in range(8):  # what was made ahead of the clock
                    next(batches)
                figures = {"name": reader.name, "widths": "int64" if wide else "stored", "workers": workers, "rows_a_second": []}
                found.append(figures)
                open_readers.append((figures, batches))
    for _ in range(config.rounds):
        for figures, batches in open_readers:
            count, seconds = read(batches, config.seconds)
            figures["rows_a_second"].append(count / seconds)
    for _, batches in open_readers:
        batches.close()  # type: ignore[attr-defined]
    return [_with_ratios(figures, found) for figures in found]


def _with_ratios(figures: Figures, everybody: list[Figures]) -> Figures:
    if "install" in figures:
        return figures
    memmap = next(other for other in everybody if other["name"] == Memmap.name and other["widths"] == figures["widths"])
    ratios = [a / b for a, b in zip(figures["rows_a_second"], memmap["rows_a_second"], strict=True)]
    return figures | {"median": machine.median(figures["rows_a_second"]), "to_memmap": machine.median(ratios)}


def goals(readers: list[Figures], widths: str) -> Figures:
    """Ours against the fastest peer and against memmap, medians over the rounds."""
    there = [figures for figures in readers if figures.get("widths") == widths]
    ours = next(figures for figures in there if figures["name"] == Ours.name)
    peers = [figures for figures in there if figures["name"] not in (Ours.name, Memmap.name)]
    found = {"widths": widths, "of_memmap": ours["to_memmap"]}
    if peers:
        best = max(peers, key=lambda figures: float(figures["median"]))
        found |= {"best_peer": best["name"], "times_best_peer": machine.median(
            [a / b for a, b in zip(ours["rows_a_second"], best["rows_a_second"], strict=True)])}  # fmt: skip
    return found


FIRST = """
import json, os, re, sys, time
from pathlib import Path
from trainer.data import NoiseDataset, Place, batches
began = time.perf_counter()
dataset = NoiseDataset(sys.argv[1])
opened = time.perf_counter()
source = batches(dataset, 1, 512, Place())
next(source)
done = time.perf_counter()
maps = sum("/shards/" in line for line in Path("/proc/self/maps").read_text().splitlines()) if Path("/proc/self/maps").exists() else 0
files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
print(json.dumps({"seconds": done - began, "manifest_seconds": opened - began, "maps": maps, "files": files}))
"""


def first_batch(folder: Path, codec: Codec, config: Config, times: int = 3) -> Figures:
    """Seconds from opening a dataset of many shards to its first batch of 512 rows, the fastest of a few processes."""
    base = rows.simulated(codec, 32, 64, config.seed)
    write_dataset(folder / "many", base, codec, 1, config.many_shards)
    found = []
    for _ in range(times):
        done = subprocess.run([sys.executable, "-c", FIRST, str(folder / "many")], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    best: Figures = min(found, key=lambda figures: float(figures["seconds"]))
    return {"shards": config.many_shards, **best}


def order(config: Config) -> Figures:
    """What the order of an epoch costs: time to its first batch, time a row after that, and memory."""
    shards = np.full(config.order_rows // 10_000, 10_000)
    made: list[Order] = []
    cpu = torch.device("cpu")

    def start() -> None:
        made.append(Order(shards, config.seed))
        made[-1].at(config.order_rows // 2, config.order_rows // 2 + 512)

    memory = machine.peak_memory(start, cpu)
    middle = config.order_rows // 2
    return {
        "rows": config.order_rows, "start_seconds": machine.best(start, cpu), "bytes": memory,
        "microseconds_a_row": machine.best(lambda: made[0].at(middle, middle + 512), cpu) / 512 * 1e6,
    }  # fmt: skip


def run(config: Config) -> Figures:
    """Measure, write the JSON, return its figures."""
    torch.set_num_threads(1)
    codec = Codec(config.vocab_size, 0.125, 1)
    found: Figures = {"readers": {}, "order": order(config)}
    with tempfile.TemporaryDirectory() as folder:
        if config.many_shards:
            found["first_batch"] = first_batch(Path(folder), codec, config)
    for length in config.block_lengths:
        base = rows.simulated(codec, length, config.distributions, config.seed)
        with tempfile.TemporaryDirectory() as folder:
            readers = measure(Path(folder), base, codec, config)
        about = {"rows": config.positions // length, "kept": len(base.index) / (len(base) * (length - 1)), "bytes_a_row": _bytes(base)}
        found["readers"][str(length)] = about | {"readers": readers, "goals": [goals(readers, widths) for widths in ("stored", "int64")]}
    results.write(Path(config.output), {name: value for name, value in asdict(config).items() if name != "output"}, found)
    return found


def _bytes(base: Rows) -> float:
    """Of a row as it is stored."""
    return sum(column.nbytes for column in (base.log_prob, *base.entries)) / len(base) + 3 * base.input_ids.shape[1]


def show(found: Figures) -> None:
    """Print the tables."""
    for length, figures in found["readers"].items():
        lines = []
        for reader in figures["readers"]:
            if "install" in reader:
                lines.append([reader["name"], "not installed", f"pip install '{reader['install']}'", "", ""])
            else:
                rate, how = reader["median"], reader["widths"] + (f", {reader['workers']} workers" if reader["workers"] else "")
                lines.append([reader["name"], how, f"{rate:,.0f}", f"{rate * int(length) / 1e6:,.1f}", f"{reader['to_memmap']:.2f}"])
        said = [
            f"{goal['widths']}: {goal['of_memmap']:.2f} of memmap's rate"
            + (f", {goal['times_best_peer']:.1f} times the best peer's ({goal['best_peer']})" if "best_peer" in goal else "")
            for goal in figures["goals"]
        ]
        size = f"{figures['kept']:.2f} entries a token, {figures['bytes_a_row']:,.0f} bytes a row"
        title = f"{figures['rows']:,} shuffled rows of {length} positions, {size}"
        results.show(title, ("reader", "widths", "rows/s", "M tokens/s", "of memmap"), lines, "; ".join(said))
    if "first_batch" in found:
        first = found["first_batch"]
        print(
            f"first batch of {first['shards']:,} shards: {first['seconds']:.2f} s ({first['manifest_seconds']:.2f} s of it the manifest), "
            f"{first['maps']} shards mapped, {first['files']} files open"
        )
    cost = found["order"]
    print(
        f"order of {cost['rows']:,} rows: first 512 in {cost['start_seconds'] * 1e3:.1f} ms, {cost['microseconds_a_row']:.2f} us a row after that, "
        f"{cost['bytes'] / 2**20:.1f} MB"
    )


def _measure_and_show(config: Config) -> None:
    show(run(config))


def main(arguments: list[str] | None = None) -> int:
    return results.command("loader", __doc__ or "", Config, _measure_and_show, arguments)


if __name__ == "__main__":
    sys.exit(main())
