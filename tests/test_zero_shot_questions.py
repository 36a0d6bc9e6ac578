"""Questions about held-out text: each has one right answer, in every place equally often, and lm-eval can ask them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import zero_shot
from noise.storage import DatasetError
from tests.eval.world import VOCAB, write_heldout, write_student, write_tokenizer

TEXTS = [f"the {n} cats  of\nParis and {n} dogs were seen at noon" for n in range(9)] + ["too short", "a b same same same f"]


def test_each_question_has_its_own_answer_once_and_wrong_ones_of_the_kind_that_is_asked() -> None:
    found = zero_shot.questions(TEXTS, 100)
    assert {name: len(asked) for name, asked in found.items()} == {zero_shot.NEXT: 9, zero_shot.ORDER: 9, zero_shot.TEXT: 9}
    for number, text in enumerate(TEXTS[:9]):
        following, ordered = found[zero_shot.NEXT][number], found[zero_shot.ORDER][number]
        for asked in (following, ordered):
            own = asked["choices"][asked["answer"]]
            assert text.startswith(asked["context"] + own) and own[0].isspace() and asked["choices"].count(own) == 1
            assert asked["answer"] == number % 4 and len(asked["choices"]) == len(set(asked["choices"])) == 4
        assert {tuple(sorted(choice.split())) for choice in ordered["choices"]} == {tuple(sorted(own.split()))}
        assert [re.findall(r"\s+", choice) for choice in ordered["choices"]] == 4 * [re.findall(r"\s+", own)]
        texts = [TEXTS[(number + step) % 9] for step in range(1, 4)]
        assert all(choice in text for choice, text in zip([c for c in following["choices"] if c != own], texts, strict=True))
        assert found[zero_shot.TEXT][number]["text"] == text
    assert zero_shot.questions(TEXTS, 5)[zero_shot.ORDER] == found[zero_shot.ORDER][:5]


def test_too_little_text_is_said() -> None:
    with pytest.raises(DatasetError, match="3 rows have more than 5 words, of which 3 in a row differ; questions need 4 such rows"):
        zero_shot.questions(TEXTS[:3], 10)
    with pytest.raises(DatasetError, match="0 rows have"):
        zero_shot.questions(["short"], 10)


def test_texts_that_go_on_alike_are_no_two_answers_of_a_question() -> None:
    alike = [f"{name} was here and he said that again" for name in ("one", "two", "three")] + ["a b c d e f g", "h i j k l m n", "o p q r s t u"]
    for asked in zero_shot.questions(alike, 10)[zero_shot.NEXT]:
        assert len(set(asked["choices"])) == 4
    with pytest.raises(DatasetError, match="continuations that differ"):
        zero_shot.questions(alike[:5], 10)


def test_students_answer_them_through_the_harness(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    write_heldout(tmp_path / "heldout", rows=30, length=16)
    write_tokenizer(tmp_path / "heldout" / "tokenizer")
    write_student(tmp_path / "mdlm", length=16)
    options = ["--heldout", str(tmp_path / "heldout"), "--folder", str(tmp_path / "out"), "--output", str(tmp_path / "found.json")]
    options += ["--students", f"['{tmp_path / 'mdlm'}']", "--questions", "6", "--draws", "2", "--device", "cpu"]
    assert zero_shot.main(options) == 0
    (figures,) = json.loads((tmp_path / "found.json").read_text())["students"].values()
    assert figures[zero_shot.NEXT]["acc,none"] * 6 == pytest.approx(round(figures[zero_shot.NEXT]["acc,none"] * 6))
    assert figures[zero_shot.TEXT]["word_perplexity,none"] > VOCAB / 10 and figures["likelihood"].startswith("a lower bound")
    kept = len(next((tmp_path / "out" / "zero-shot").glob("*.jsonl")).read_text().splitlines())
    assert kept == 6 * (4 + 3 + 1), "the right answer is the same one, and is asked for once"
    assert zero_shot.main(options) == 0
