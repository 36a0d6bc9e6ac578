"""The datasets and runs of tests.trainer.runs, where a test asks for one."""

from tests.trainer.runs import data, undisturbed, undisturbed_two

__all__ = ["data", "undisturbed", "undisturbed_two"]
