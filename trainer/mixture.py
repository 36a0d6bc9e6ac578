"""Several datasets mixed by weight, read as one.

Contract: as for one dataset (trainer/order.py): sample n of a run is the same row on any number of processes and across any
resume, so the state is one integer, the samples consumed; each dataset's own epoch and draw of noise follow from it.
In every 65,536 samples each dataset has exactly its share, rounded to whole samples.
Text of a corpus and text that the teacher wrote (sequence-level distillation) may be mixed; the noise of each row is its own dataset's.
Another vocabulary, block length or tokenizer is refused by field; the rest of the identity only where the student reads it
(`refuse_unreadable`): text alone asks for no teacher and no sketch.
Shapes: B samples, D datasets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from noise.dataset import Manifest
from noise.identity import differences
from noise.storage import DatasetError, canonical_json, sha256_text
from trainer.batch import Batch
from trainer.config import StudentConfig
from trainer.gather import Located
from trainer.objectives import check_dataset
from trainer.order import BLOCK, MixtureOrder, Order, Place
from trainer.shards import NoiseDataset, assemble

Array = npt.NDArray[Any]
TEXT = ("vocab_size", "block_length", "tokenizer")
"""Fields of the identity that must be the same whatever the student reads."""
LAW = ("teacher", "generation.special_tokens")
"""What decides the teacher's distribution, and so which noise belongs to a text."""
SKETCH = ("epsilon", "draws")
"""What decides how the noise of extracted text is kept."""
_ABSENT = {"generation.special_tokens": "allowed"}
"""What is meant where a field is not there: extraction masks no tokens."""


class Mixture:
    """Datasets and their weights; rows are numbered through, dataset after dataset."""

    def __init__(self, datasets: Sequence[NoiseDataset], weights: Sequence[float]):
        """Raises ValueError for a weight that is no positive number, DatasetError for datasets that do not fit each other."""
        for dataset, weight in zip(datasets, weights, strict=True):
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"data.mix: the weight of {dataset.address} is {weight}; it must be above 0")
            refuse_unlike(dataset, datasets[0], "data.mix", TEXT)
        self.datasets, self.weights = list(datasets), [weight / sum(weights) for weight in weights]
        first, kinds = datasets[0], {dataset.extraction for dataset in datasets}
        self.folder, self.block_length = first.folder, first.block_length
        self.extraction = "none" if "none" in kinds else kinds.pop() if len(kinds) == 1 else "mixed"
        """none: not all rows have noise; mixed: some were extracted, some written by the teacher"""
        self.codec = next((dataset.codec for dataset in datasets if dataset.extraction == "parallel"), first.codec)
        self._draws_D = np.array([dataset.codec.draws for dataset in datasets])
        self._written_D = np.array([dataset.extraction == "sequential" for dataset in datasets])
        self.address = " + ".join(f"{weight:.3g} {dataset.address}" for dataset, weight in zip(datasets, self.weights, strict=True))
        self._starts = np.cumsum([0] + [len(dataset) for dataset in datasets])
        parts = [{"weight": weight, "root_hash": dataset.manifest.root_hash} for dataset, weight in zip(datasets, self.weights, strict=True)]
        mixed = [part | {"identity": dataset.manifest.identity} for part, dataset in zip(parts, datasets, strict=True)]
        self.manifest = Manifest(first.manifest.identity | {"mixture": mixed}, [], sha256_text(canonical_json(parts)))
        """The first dataset's identity, with all of them as `mixture`; a root hash of their root hashes and weights."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def order_name(self) -> str:
        return f"mixed in blocks of {BLOCK}: " + "; ".join(dataset.order_name for dataset in self.datasets)

    @property
    def tokenizer(self) -> Any:
        return self.datasets[0].tokenizer

    def batch(self, row_B: Array, draw_B: Array | int = 0, place_B: Array | None = None, narrow: bool = False, pin: bool = False) -> Batch:
        which_B = np.searchsorted(self._starts, row_B, side="right") - 1
        parts = []
        for number in np.unique(which_B).tolist():
            at_B = np.flatnonzero(which_B == number)
            parts.append((at_B, self.datasets[number].locate(row_B[at_B] - self._starts[number])))
        return assemble(self, Located.join(parts), self._written_D[which_B], draw_B % self._draws_D[which_B], place_B, narrow, pin)

    def spread(self, count: int) -> Array:
        """At most that many rows, of each dataset as its weight has it, int64."""
        shares = [max(1, round(count * weight)) for weight in self.weights]
        return np.concatenate([start + dataset.spread(share) for start, dataset, share in zip(self._starts, self.datasets, shares, strict=False)])

    def order(self, seed: int) -> Mixed:
        return Mixed([dataset.order(seed) for dataset in self.datasets], self.weights, self._starts, seed)

    def hold(self, order: Mixed, start: int, stop: int) -> None:
        for number, (first, last) in enumerate(order.own(start, stop)):
            self.datasets[number].hold(order.orders[number], first, max(first + 1, last))

    @property
    def cache_bytes(self) -> int:
        return max(dataset.cache_bytes for dataset in self.datasets)

    def needed_bytes(self, span: int) -> int:
        return sum(dataset.needed_bytes(span) for dataset in self.datasets)

    def release(self) -> None:
        for dataset in self.datasets:
            dataset.release()


class Mixed:
    """The order of a mixture's rows."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], starts: Array, seed: int):
        self.orders, self._starts = orders, starts
        self._which = MixtureOrder(weights, seed)

    def at(self, start: int, stop: int) -> tuple[Array, Array]:
        """(rows of the mixture, their datasets' epochs) of samples start..stop-1, int64 [B] each."""
        which_B, number_B = self._which.at(start, stop)
        row_B, epoch_B = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        for number in np.unique(which_B).tolist():
            at_B = np.flatnonzero(which_B == number)
            own_B = number_B[at_B]  # consecutive: a dataset's samples are taken in order
            row_B[at_B], epoch_B[at_B] = self.orders[number].at(int(own_B[0]), int(own_B[-1]) + 1)
            row_B[at_B] += self._starts[number]
        return row_B, epoch_B

    def own(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(first, one past the last) own sample of each dataset in samples start..stop-1."""
        return [(self._which.before(start, number), self._which.before(stop, number)) for number in range(len(self.orders))]

    def place(self, sample: int) -> Place:
        return Place(0, sample)

    def sample(self, place: Place) -> int:
        return place.consumed


def extracted(datasets: Sequence[NoiseDataset]) -> list[NoiseDataset]:
    return [dataset for dataset in datasets if dataset.extraction == "parallel"]


def read_by(student: StudentConfig, datasets: Sequence[NoiseDataset]) -> Sequence[NoiseDataset]:
    """Those of which the student reads more than the text: the noise of all, or for token_kd the entries that were kept."""
    return datasets if student.noise.informed else extracted(datasets) if student.objective.token_kd else []


def refuse_unreadable(student: StudentConfig, datasets: Sequence[NoiseDataset], what: str) -> None:
    """DatasetError where the student reads noise or kept entries that a dataset lacks, or that are not of one law.

    The noise that the teacher wrote a text from and the posterior noise of extracted text have one law given the text, if it is one teacher:
    a student may read both. Beside written text token_kd counts on the rows that were extracted, so the others need nelbo.
    """
    reads, kept = read_by(student, datasets), extracted(datasets)
    for dataset in datasets:
        if dataset.extraction == "none" and student.noise.informed:
            raise DatasetError(
                f"{what} {dataset.address} has tokens but no noise (extraction: none); set student.noise.kind to none or extract with a teacher"
            )
        if not (kept and dataset.extraction == "sequential" and student.objective.nelbo):
            check_dataset(student.objective, dataset.extraction, f"{what} {dataset.address}")
    for dataset in reads:
        refuse_unlike(dataset, reads[0], what, LAW)
    for dataset in extracted(reads):
        refuse_unlike(dataset, kept[0], what, SKETCH)


def refuse_unlike(dataset: Any, other: Any, what: str, names: Sequence[str]) -> None:
    """DatasetError that names every field of these in which two datasets' identities differ."""
    ours, theirs = dataset.manifest.identity, other.manifest.identity
    changed = [line for name in names for line in differences(_field(ours, name), _field(theirs, name), name)]
    if changed:
        raise DatasetError(f"{what} {dataset.address} does not fit {other.address}: " + "; ".join(changed))


def _field(identity: Any, name: str) -> Any:
    for part in name.split("."):
        identity = identity.get(part) if isinstance(identity, dict) else None
    return _ABSENT.get(name) if identity is None else identity
