"""The store of tests.noise.s3, where a test asks for it."""

from tests.noise.s3 import bucket

__all__ = ["bucket"]
