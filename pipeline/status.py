"""How far a dataset is: its plan, its receipts, and what run.jsonl says of the runs that made them.

Reads only, so it can be asked at any moment, on any machine that sees the folder. The rate is of the last run, from its
first shard on, by the clocks of the machines that wrote; where there is no run.jsonl there is no rate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from noise.dataset import Manifest, Plan
from noise.folder import Folder, Where
from noise.receipt import Receipt, committed
from noise.storage import DatasetError
from pipeline.estimate import human
from pipeline.progress import duration
from pipeline.run_log import last_run

LATELY = 600.0
"""Seconds that the rate now looks back."""


@dataclass(frozen=True)
class Status:
    """Of a dataset."""

    shards: int
    receipts: list[Receipt]
    finished: bool
    work_done: int
    """In characters of the corpus, or in rows that a teacher writes."""
    work: int
    events: list[dict[str, Any]]
    """Of the last run, oldest first."""

    @classmethod
    def read(cls, folder: Folder) -> Status:
        """Raises DatasetError when the folder holds no plan."""
        if not folder.exists("plan.json"):
            raise DatasetError(f"{folder} is not a noise dataset: it has no plan.json")
        plan = Plan.read(folder)
        done = {shard: receipt for shard, receipt in committed(folder).items() if shard < len(plan.shards)}
        unit = "rows" if plan.identity["extraction"] == "sequential" else "characters"
        work = [int(shard[unit]) for shard in plan.shards]
        finished = folder.exists("manifest.json") and Manifest.read(folder).identity == plan.identity
        return cls(len(work), list(done.values()), finished, sum(work[shard] for shard in done), sum(work), last_run(folder))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") == kind]

    def rate(self, seconds: float | None = None) -> float | None:
        """Tokens a second of the last run, or of its last `seconds`; None where it has not made two shards in them."""
        made = self.of("shard")
        if seconds is not None and made:
            made = [event for event in made if event["time"] >= made[-1]["time"] - seconds]
        if len(made) < 2 or made[-1]["time"] <= made[0]["time"]:
            return None
        return sum(event["receipt"]["tokens"] for event in made[1:]) / (made[-1]["time"] - made[0]["time"])


def in_words(where: Where) -> str:
    """A few lines for people."""
    folder = Folder.of(where)
    status = Status.read(folder)
    receipts = status.receipts
    tokens, size = sum(receipt.tokens for receipt in receipts), sum(receipt.bytes for receipt in receipts)
    state = "finished" if status.finished else f"{status.shards - len(receipts):,} left"
    rows = sum(receipt.rows for receipt in receipts)
    lines = [
        f"{folder}: {len(receipts):,} of {status.shards:,} shards committed, {state}",
        f"  holds   {rows:,} rows, {tokens:,} positions with noise, {human(size)}",
    ]
    out = [row for receipt in receipts for row in receipt.quarantined]
    if out:
        lines.append(f"  out     {len(out):,} rows quarantined, {sum(row.tokens for row in out):,} tokens")
    if not status.finished and status.events:
        lines += _run(status)
    return "\n".join(lines)


def _run(status: Status) -> list[str]:
    """The run that is going on, or was."""
    last = status.events[-1]
    ago = duration(max(0.0, time.time() - last["time"]))
    lines = [f"  run     last heard of {ago} ago: {last['event']}"]
    overall, now = status.rate(), status.rate(LATELY)
    if overall is not None and now is not None:
        per_token = (status.work - status.work_done) / max(1, status.work_done)
        left = per_token * sum(receipt.tokens for receipt in status.receipts) / now
        lines.append(f"  rate    {now:,.0f} tokens/s now, {overall:,.0f} overall, {duration(left)} to go")
    counts = {name: len(status.of(event)) for name, event in (("retried", "shard retried"), ("failed", "shard failed"), ("deaths", "worker died"))}
    if any(counts.values()):
        lines.append(f"  trouble {counts['retried']} shards tried again, {counts['failed']} failed, {counts['deaths']} workers died")
        lines += [f"          {event['reason']}" for event in status.of("shard failed")[-3:]]
    return lines
