"""One process or many: what `torchrun` says about this process, and the few sums that cross processes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0


def start(device: str, threads: int) -> World:
    """Join the process group that torchrun describes (gloo on CPU, nccl on GPU), or be alone."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU; set device to auto or cpu")
    if kind == "cpu":
        torch.set_num_threads(max(1, (threads or len(os.sched_getaffinity(0))) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        place = torch.device("cpu")
    else:
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return World(rank, size, place)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
