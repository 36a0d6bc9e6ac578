"""One process or many: what `torchrun` says about this process, and the few sums that cross processes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_LOST = ("gloo", "Gloo", "NCCL", "onnection")
"""Words in what torch says when the other end of a connection is gone."""
FAREWELL = 0.5
"""Seconds."""


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes. Crosses between hosts' memories: a GPU that still computes is not waited for."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def gather(self, tensor: Tensor) -> Tensor:
        """A CPU tensor [...] of each process, stacked in rank order [R, ...]."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0


@contextlib.contextmanager
def joined(device: str, threads: int) -> Iterator[World]:
    """The processes that this one belongs to, until the end. A failed peer is ValueError here, for its own message says what happened."""
    world = start(device, threads)
    in_order = world.device.type == "cpu"  # a GPU whose peers are gone may wait for ever in a farewell
    try:
        yield world
        in_order = True
    except KeyboardInterrupt:
        in_order = True
        raise
    except RuntimeError as error:
        if world.size > 1 and any(word in str(error) for word in _LOST):
            raise ValueError("another process of this run ended; its own message says why. The last checkpoint stands.") from None
        raise
    finally:
        if in_order:
            stop()


def start(device: str, threads: int) -> World:
    """Join the process group that torchrun describes (gloo between CPUs, nccl between GPUs), or be alone."""
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
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return World(rank, size, place)


def stop() -> None:
    """Leave the group. gloo's own thread still lets go of the last sum's tensors, for which it needs the interpreter: a group that is destroyed
    before, by whoever holds it last, waits for that thread with the interpreter in its hands, for ever."""
    if dist.is_initialized():
        time.sleep(FAREWELL)
        dist.destroy_process_group()
