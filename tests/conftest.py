"""Set before torch is imported: eager functions (compilation has tests of its own), one thread, and property tests that repeat exactly."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")
