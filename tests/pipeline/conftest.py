"""The stores of tests.noise.s3 and tests.noise.gcs, where a test asks for one."""

from tests.noise.gcs import gs_bucket
from tests.noise.s3 import bucket

__all__ = ["bucket", "gs_bucket"]
