"""What limits one call is measured against an ideal reader that brute force confirms, on students that differ in one thing each."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import one_call
from benchmarks.one_call import Config, noise_of, students
from benchmarks.reach import equivalent, ideal, maps, shown, windows
from trainer.config import NoiseConfig

SMALL = Config(states=5, successors=3, length=5, sequences=400)


def pushed(g_SLV: torch.Tensor, row: int, at: int, before: int) -> list[float]:
    """P(token at `at` | the noise of it and of `before` positions before it), by hand, state by state."""
    first, log_p, g_LV = max(0, at - before), SMALL.chain.log_p.tolist(), g_SLV[row].tolist()
    law = [1.0, *[0.0] * 5] if first == 0 else SMALL.chain.transition[0].tolist()  # the chain starts as it goes on
    for position in range(first, at + 1):
        after = [0.0] * 6
        for state, mass in enumerate(law):
            scores = [log_p[state][token] + g_LV[position][token] for token in range(6)]
            after[scores.index(max(scores))] += mass
        law = after
    return law


@pytest.mark.parametrize("before", [0, 1, 3])
def test_an_ideal_reader_is_as_sure_as_the_states_that_its_noise_leaves(before: int) -> None:
    g_SLV = noise_of(SMALL)[:40]
    found_L = ideal(SMALL.chain, maps(SMALL.chain, g_SLV), before)
    for at in range(5):
        assert found_L[at] == pytest.approx(sum(max(pushed(g_SLV, row, at, before)) for row in range(40)) / 40, abs=1e-6)


def test_an_ideal_readers_guess_is_the_teachers_token_as_often_as_it_says() -> None:
    g_SLV, own_SL = noise_of(SMALL), SMALL.chain.rollout(torch.arange(400), 6, SMALL.seeds[0])[:, 1:]
    law_S6 = torch.tensor([pushed(g_SLV, row, 4, 1) for row in range(400)])
    said, right_S = ideal(SMALL.chain, maps(SMALL.chain, g_SLV), 1)[4], (law_S6.argmax(1) == own_SL[:, 4]).double()
    assert abs(float(right_S.mean()) - said) < 4 * (said * (1 - said) / 400) ** 0.5
    assert 0.3 < said < 0.95


def test_all_noise_up_to_a_position_says_its_token() -> None:
    found = [ideal(SMALL.chain, maps(SMALL.chain, noise_of(SMALL)), before) for before in range(5)]
    assert all((more >= less - 1e-12).all() for less, more in itertools.pairwise(found))
    assert found[4] == pytest.approx(1) and found[0][0] == pytest.approx(1) and found[0][1] < 0.9
    assert equivalent(float(found[2].mean()), [float(each.mean()) for each in found]) == pytest.approx(2)


class Reader:
    """A student whose answer at a position is the argmax of the noise some places before it."""

    vocab_size, mask_id, ahead, noise = 6, 6, 0, NoiseConfig(kind="gumbel", readout=True)

    def __init__(self, back: int):
        self.back = back

    def logits(self, ids_BL: torch.Tensor, g_NV: torch.Tensor) -> torch.Tensor:
        return g_NV.view(len(ids_BL), -1, 6).roll(self.back, 1).flatten(0, 1)


@pytest.mark.parametrize(("back", "blind"), [(0, []), (1, ["0"]), (2, ["0", "1"]), (-1, ["0", "1", "2", "all before"])])
def test_a_student_answers_from_the_noises_that_it_is_shown(back: int, blind: list[str]) -> None:
    g_SLV, other_SLV = (noise_of(Config(states=5, successors=3, length=5, sequences=50, few_rows=9, seeds=[seed])) for seed in (1, 2))
    told = shown(Reader(back), g_SLV, other_SLV, torch.ones(5, 5, dtype=torch.bool))
    inner = slice(2, 4)  # positions whose neighbours are in the row
    for name, seen_LL in windows(5, [0, 1, 2]).items():
        same = torch.equal(shown(Reader(back), g_SLV, other_SLV, seen_LL)[:, inner], told[:, inner])
        assert same == (name not in blind), name


def test_students_differ_from_the_base_in_one_thing() -> None:
    named = students(Config())
    base = flat(asdict(named["base"]))
    for name, student in named.items():
        changed = {field for field, value in flat(asdict(student)).items() if value != base[field]} - {"factor"}
        changed -= {"model.kind", "model.block_size"} if named[name].model.clip[0] > 0 else set()  # one block over the row is the base
        drafts = {field for field in changed if "draft" in field}
        assert len(changed - drafts) == (0 if name in ("base", "4 layers, 1 draft", "4 layers, no drafts") else 1), (name, changed)
        assert not drafts or student.factor == "depth" or name == "input alone (paper)"


def flat(value: dict[str, Any], name: str = "") -> dict[str, Any]:
    pairs = [flat(inner, f"{key}.") if isinstance(inner, dict) else {f"{name}{key}": inner} for key, inner in value.items()]
    return {key: inner for pair in pairs for key, inner in pair.items()}


def test_the_study_measures_each_student_once_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    arguments = [
        "--students", "[base, epsilon 1/2, all masked always]", "--seeds", "[1,2]", "--states", "5", "--successors", "3",
        "--length", "5", "--rows", "64", "--hidden", "16", "--heads", "2", "--steps", "2", "--global_batch", "4", "--sequences", "20",
        "--few_rows", "6", "--folder", str(tmp_path / "study"), "--output", str(tmp_path / "one_call.json"),
    ]  # fmt: skip
    assert one_call.main(arguments) == 0
    shown_first, found = capsys.readouterr().out, json.loads((tmp_path / "one_call.json").read_text())
    assert [row["name"] for row in found["students"]] == ["base", "all masked always", "epsilon 1/2"]
    for row in found["students"]:
        for each in row["seeds"].values():
            assert each["match"]["mean"] == pytest.approx(sum(each["by_position"]) / 5) and set(each["valid"]) == {"1", "2", "4"}
            assert 0 <= each["posterior"]["mean"] <= 1 and [window["shown"] for window in each["windows"]][-2:] == ["all before", "all"]
    assert "| ideal reader |" in shown_first and found["ideal"][-1] == pytest.approx(1) and found["hardware"]
    monkeypatch.setattr("trainer.loop._Run", None)
    monkeypatch.setattr(one_call, "measured", None)
    assert one_call.main(arguments) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")] == [
        line for line in shown_first.splitlines() if line.startswith("| ")
    ]


def test_what_cannot_be_studied_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_call.main(["--students", "[tall]"]) == 1
    assert "students names ['tall']" in capsys.readouterr().err
    with pytest.raises(ValueError, match="few_rows is 9, of sequences 5"):
        Config(sequences=5, few_rows=9)
