"""Which systems a report has, and which of them are compared: no student is loaded, nothing is drawn."""

from __future__ import annotations

from pathlib import Path

from eval import systems
from eval.config import System
from eval.report import free_pairs
from tests.eval.world import LENGTH, VOCAB, write_blocks


def test_one_forward_a_token_of_blocks_is_drawn_where_the_report_goes_as_far(tmp_path: Path) -> None:
    write_blocks(tmp_path / "blocks")
    for nfe, found in (([1, 2, 4], [2, 4]), ([1, 2, 4, 7], [2, 4, 8]), ([7], [2, 4, 8])):
        assert systems.discover(tmp_path, nfe, (VOCAB, LENGTH))[0]["blocks"].nfe == found


def test_a_free_baseline_is_compared_with_every_free_system_once() -> None:
    systems = {name: System(student, sampler=sampler, auxiliary="lm" * (sampler == "adaptive")) for name, student, sampler in [
        ("hits", "a", "first_hitting"), ("few", "a", "adaptive"), ("noisy", "b", "adaptive"), ("other", "c", "first_hitting"),
    ]}  # fmt: skip
    pairs = [("few", "hits"), ("noisy", "hits"), ("other", "hits"), ("few", "noisy"), ("other", "noisy")]
    assert free_pairs(systems, list(systems), pairs) == [
        ("few", "hits"), ("noisy", "hits"), ("noisy", "few"), ("other", "hits"), ("other", "noisy"),
    ]  # fmt: skip
