"""What a run is made of: datasets that fit each other, a student with its first weights, an optimizer."""

from __future__ import annotations

import torch

from noise.storage import DatasetError
from trainer.config import DataConfig, OptimConfig, TrainConfig
from trainer.data import Dataset, Mixture, NoiseDataset, open_data, unigram
from trainer.distributed import World
from trainer.initialise import start_from
from trainer.mixture import LAW, TEXT, read_by, refuse_unlike, refuse_unreadable
from trainer.students import Student, build


def open_training(data: DataConfig) -> Dataset:
    """Raises DatasetError where it is not the dataset that is pinned."""
    if data.root_hash and not data.check_hashes:
        raise ValueError("data.root_hash is set, but data.check_hashes is false, so that nothing would hold the shards to it; set it to true")
    dataset = open_data(data)
    if data.root_hash and dataset.manifest.root_hash != data.root_hash:
        raise DatasetError(
            f"data.root_hash is {data.root_hash}, but {dataset.address} has root hash {dataset.manifest.root_hash}: another dataset, or another "
            "state of it; fetch the one that was pinned, or pin this one"
        )
    return dataset


def open_heldout(config: TrainConfig, dataset: Dataset) -> NoiseDataset | None:
    """The held-out dataset, if one is named, of either kind. Raises DatasetError where it does not fit the training one, or the student."""
    data = config.data
    if not data.heldout:
        return None
    heldout = NoiseDataset(data.heldout, data.check_hashes, cache=data.cache, cache_bytes=data.cache_bytes)
    refuse_unlike(heldout, dataset, "data.heldout", TEXT)
    refuse_unreadable(config.student, [heldout], "data.heldout")
    for read in read_by(config.student, _parts(dataset)):
        refuse_unlike(heldout, read, "data.heldout", LAW)
    return heldout


def _parts(dataset: Dataset) -> list[NoiseDataset]:
    return dataset.datasets if isinstance(dataset, Mixture) else [dataset]


def new_student(config: TrainConfig, dataset: Dataset, start: bool) -> tuple[Student, list[str]]:
    """A student on CPU and, where it is to `start` and not to resume, with the weights before its first step; and what to say of those."""
    refuse_unreadable(config.student, _parts(dataset), "data.mix" if config.data.mix else "data.path")
    torch.manual_seed(config.seed)
    student = build(config.student, dataset.codec.vocab_size, dataset.block_length)
    said = student.fits(dataset)
    if not start:
        return student, said
    said += start_from(student, config.student.init_from) if config.student.init_from else []
    noise_input = getattr(student, "input", None)
    if noise_input is not None and config.student.noise.prior == "unigram":
        noise_input.log_unigram_V.copy_(unigram(dataset))
    return student, said


def new_optimizer(student: Student, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the weights that are trained."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    betas = (optim.betas[0], optim.betas[1])
    return torch.optim.AdamW(trained, lr=optim.lr, betas=betas, weight_decay=optim.weight_decay, foreach=True)


def shares(optim: OptimConfig, world: World) -> tuple[int, int]:
    """Rows of each process in a step, and of each of its micro-batches. Raises ValueError where the global batch is no whole number of them."""
    if optim.global_batch % world.size:
        raise ValueError(f"optim.global_batch is {optim.global_batch}, not a multiple of the {world.size} processes")
    share = optim.global_batch // world.size
    micro = optim.micro_batch or share
    if share % micro:
        raise ValueError(f"optim.global_batch {optim.global_batch} is not processes {world.size} x optim.micro_batch {micro} x a whole accumulation")
    return share, micro
