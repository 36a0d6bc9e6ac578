"""Read a shard with one byte or bit changed at a time, and print what came of it as JSON: run as a program, since a crash would end it.

python -m tests.noise.flip_bytes SHARD COUNT SEED
"""

from __future__ import annotations

import collections
import json
import random
import sys
from pathlib import Path

from noise.shard import ShardReader
from noise.storage import DatasetError


def outcome(path: Path) -> str:
    """`rows` or `DatasetError`; any other exception by name. Rows that come back are read to their last byte."""
    try:
        for rows in ShardReader(path):
            for column in vars(rows):
                for part in rows.entries if column == "entries" else [getattr(rows, column)]:
                    part.sum()
        return "rows"
    except DatasetError:
        return "DatasetError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(path: Path, count: int, seed: int) -> None:
    whole, damaged, chance = path.read_bytes(), path.with_suffix(".damaged"), random.Random(seed)
    found: collections.Counter[str] = collections.Counter()
    # half of the changes in the schema at the head and the footer at the end, where structure is
    structure = [*range(min(2000, len(whole))), *range(max(0, len(whole) - 3000), len(whole))]
    for trial in range(count):
        content = bytearray(whole)
        at = chance.choice(structure) if trial % 2 else chance.randrange(len(whole))
        content[at] = content[at] ^ (1 << chance.randrange(8)) if trial % 4 < 2 else chance.choice([0, 1, 127, 128, 255])
        damaged.write_bytes(content)
        found[outcome(damaged)] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
