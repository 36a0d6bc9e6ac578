"""`python -m tests.noise.rival DATASET ROWS`: a writer in a process of its own. For every shard number on stdin it makes ROWS rows,
says "ready", waits for a line, commits them, and prints the sha256 of the receipt that stands. Writers of other ROWS make other bytes."""

import random
import sys
import time

import torch

from noise import stores
from noise.commit import commit_shard
from noise.dataset import Plan
from tests.noise.teachers import BigramTeacher, shard_rows


def main(dataset: str, rows: str) -> None:
    torch.set_num_threads(1)
    stores.pause = lambda attempt: time.sleep(random.uniform(0.5, 1.0) * 2.0**attempt / 500)  # as it is, 500 times faster
    plan, teacher = Plan.read(dataset), BigramTeacher(40)
    for line in sys.stdin:
        metadata = plan.metadata(int(line))
        made = list(shard_rows(teacher, metadata, int(rows)))
        print("ready", flush=True)
        sys.stdin.readline()
        print(commit_shard(dataset, metadata, made, characters_in=0).sha256, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
