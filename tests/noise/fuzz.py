"""A coverage-guided search for bytes that break a reader, by hand: it needs atheris, which is no dependency (`pip install atheris`).

    python -m tests.noise.fuzz shard WORK [tests/corpus/shard] -max_total_time=600 -max_len=20000 -timeout=20 -rss_limit_mb=4096

WORK collects what reached new code; a finding is written beside, and what is worth keeping goes to tests/corpus/KIND, which CI replays.
Coverage is of this project's Python; of Arrow's and safetensors' native code only what comes of it is seen (crash, hang, memory).
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def main() -> None:
    import atheris
    import torch  # noqa: F401  (imported first, so that only this project is instrumented)

    with atheris.instrument_imports(include=["noise", "trainer"]):
        import trainer.shards
        import trainer.students  # noqa: F401  (which targets import only as they run)
        from tests.noise import hostile

    kind = sys.argv.pop(1)

    def one(content: bytes) -> None:
        found = hostile.of_bytes(kind, content)
        if found not in ("read", "DatasetError"):
            raise RuntimeError(found)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
