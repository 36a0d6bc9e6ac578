"""What the server of `processes` imports before it forks: all that a run imports late."""

import jsonargparse  # noqa: F401
import pandas  # noqa: F401 - pyarrow does, where it is installed
import torch
import torch._dynamo
import torch.distributed
import yaml  # noqa: F401

from noise import philox
from trainer.__main__ import parse

parse(["--output", "nowhere"])
philox.gumbel(torch.zeros(1, 5, dtype=torch.int64), 8)  # compiles
