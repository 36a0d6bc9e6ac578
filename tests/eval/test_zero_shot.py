"""Students as models of the zero-shot harness, and a stand-in for it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from eval import zero_shot
from eval.__main__ import main
from eval.answering import TextStudent, encode_pair
from eval.config import SampleConfig
from eval.ledger import Ledger
from eval.zero_shot import ZeroShotConfig
from tests.eval.harness import Request, put_in_place
from tests.eval.world import LENGTH, VOCAB, write_heldout, write_student, write_tokenizer
from trainer.config import NoiseConfig, StudentConfig
from trainer.students import build, save_student

NOISE = NoiseConfig(kind="gumbel", input="replace", readout=True)


def test_text_is_split_where_the_continuation_begins_and_owns_the_blank(tmp_path: Path) -> None:
    from eval.causal import load_tokenizer

    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert encode_pair(tokenizer, "w5 w6 ", "w7 w8") == ([5, 6], [7, 8])
    assert encode_pair(tokenizer, "", "w7") == ([], [7])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_heldout(folder / "heldout")
    write_tokenizer(folder / "heldout" / "tokenizer")
    write_student(folder / "mdlm")
    torch.manual_seed(2)
    blocks = build(StudentConfig(kind="bd3lm", layers=2, hidden=16, heads=2, block_size=2), VOCAB, LENGTH)
    save_student(folder / "bd3lm", blocks, blocks.state_dict(), {}, {"dataset": str(folder / "heldout")})
    write_student(folder / "gumbel", noise=NOISE)
    write_student(folder / "ar", kind="ar")
    ahead = build(StudentConfig(kind="mtp", layers=1, hidden=16, heads=2, predict=2, context="drawn"), VOCAB, LENGTH)
    save_student(folder / "mtp", ahead, ahead.state_dict(), {}, {"dataset": str(folder / "heldout")})
    row = build(StudentConfig(kind="mtp", layers=1, hidden=16, heads=2, predict=2), VOCAB, LENGTH)
    save_student(folder / "mtp-row", row, row.state_dict(), {}, {"dataset": str(folder / "heldout")})
    questions = [{"question": f"w{i} w{i + 1}", "choices": ["w3 w4", "w5", "w6 w7"], "answer": i % 3} for i in range(4, 9)]
    (folder / "questions.json").write_text("\n".join(map(json.dumps, questions)))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/questions.json}}}}\ntest_split: test\n"
    (folder / "tasks").mkdir()
    (folder / "tasks" / "choice.yaml").write_text(
        "task: choice\noutput_type: multiple_choice\n" + common + "doc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "tasks" / "rolling.yaml").write_text(
        "task: rolling\noutput_type: loglikelihood_rolling\n" + common + "doc_to_text: ''\ndoc_to_target: '{{question}} w3 w4 w5 w6 w7 w8 w9 w10'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    (folder / "tasks" / "written.yaml").write_text(
        "task: written\noutput_type: generate_until\n" + common + "doc_to_text: '{{question}}'\ndoc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs: {until: [' w1 '], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder


@pytest.mark.parametrize("kind", ["mdlm", "bd3lm", "mtp", "gumbel", "ar"])
@pytest.mark.parametrize("harness", ["lm_eval", "stand-in"])
def test_every_student_is_a_model_of_the_harness(
    world: Path, tmp_path: Path, kind: str, harness: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch) if harness == "stand-in" else pytest.importorskip("lm_eval")
    arguments = command(world, tmp_path, kind)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads(next((tmp_path / "zero-shot").glob("*.json")).read_text())
    assert 0 <= found["results"]["choice"]["acc,none"] <= 1 and found["results"]["rolling"]["word_perplexity,none"] > 1
    assert ("understate it" in out) == (kind == "gumbel") and ("likelihood: exact" in out) == (kind in ("ar", "bd3lm", "mtp"))
    kept = next((tmp_path / "zero-shot").glob("*.jsonl"))
    before = kept.read_bytes()
    assert main(arguments) == 0 and kept.read_bytes() == before and len(before.splitlines()) == 5 * 3 + 5 + 5


def command(world: Path, output: Path, kind: str, tasks: str = "choice,rolling,written") -> list[str]:
    return ["zero-shot", "--student", str(world / kind), "--tasks", tasks, "--task_folder", str(world / "tasks"), "--output", str(output),
            "--draws", "4", "--device", "cpu"]  # fmt: skip


@pytest.mark.parametrize("kind", ["gumbel", "ar"])
def test_the_figures_are_those_of_the_students_own_answers(world: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    for tasks in ("choice", "written,rolling"):  # the second command adds to what the first one found
        assert main(command(world, tmp_path, kind, tasks)) == 0
    found = json.loads(next((tmp_path / "zero-shot").glob("*.json")).read_text())
    answers = TextStudent(SampleConfig(str(world / kind), "", choose="argmax", device="cpu"), 4)
    questions = [json.loads(line) for line in (world / "questions.json").read_text().splitlines()]
    right = 0
    for question in questions:
        log_p = [answers.log_likelihood(question["question"], f" {text}")[0] for text in question["choices"]]
        right += log_p.index(max(log_p)) == question["answer"]
    texts = [f"{question['question']} w3 w4 w5 w6 w7 w8 w9 w10" for question in questions]
    perplexity = math.exp(-sum(map(answers.rolling, texts)) / sum(len(text.split()) for text in texts))
    assert found["results"]["choice"]["acc,none"] == right / len(questions) and found["n-samples"]["choice"]["effective"] == len(questions)
    assert found["results"]["rolling"]["word_perplexity,none"] == pytest.approx(perplexity) and set(found["versions"]) == set(found["results"])
    kept = [json.loads(line)["value"] for line in next((tmp_path / "zero-shot").glob("*.jsonl")).read_text().splitlines()]
    written = answers.write([question["question"] for question in questions], 3, {})
    assert [value for value in kept if isinstance(value, str)] == [text.split(" w1 ")[0] for text in written]


def test_the_harness_is_asked_for_the_tasks_examples_and_questions_that_were_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = put_in_place(monkeypatch)
    assert main([*command(world, tmp_path, "ar", "rolling, choice"), "--limit", "2", "--fewshot", "0"]) == 0
    assert "|rolling|word_perplexity,none|" in capsys.readouterr().out
    assert main(command(world, tmp_path, "ar", "standard")) == 1
    assert "tasks arc_easy, arc_challenge, hellaswag" in capsys.readouterr().err  # the stand-in has none of them
    eight = ["arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "social_iqa", "boolq"]
    assert harness.called == [
        {"tasks": ["rolling", "choice"], "num_fewshot": 0, "limit": 2}, {"tasks": eight, "num_fewshot": None, "limit": None},
    ]  # fmt: skip


class Scripted:
    """Answers by rule, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def log_likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        self.asked.append((context, continuation))
        return -float(len(continuation)), continuation == context

    def rolling(self, text: str) -> float:
        self.asked.append((text,))
        return -10.0 * len(text)

    def write(self, contexts: list[str], tokens: int, settings: dict[str, object]) -> list[str]:
        self.asked.append((contexts, tokens, settings))
        return [f"{context}1 {context}2. and\nmore" for context in contexts]


def test_requests_are_answered_in_order_and_each_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    scripted, config = Scripted(), ZeroShotConfig("s", str(tmp_path), batch=2)
    short, long = {"until": [".", "\n"], "max_gen_toks": 7}, {"until": "\n"}
    pairs = [Request(("a", "bb")), Request(("c", "c")), Request(("a", "bbb"))]
    single = [Request(("a",)), Request(("dd",))]
    writing = [Request((context, settings)) for context, settings in (("p", short), ("q", long), ("r", short), ("s", short), ("t", {}))]
    for _ in range(2):
        with Ledger(tmp_path / "kept.jsonl") as ledger:
            model = zero_shot._model(scripted, config, ledger)  # type: ignore[arg-type]
            assert model.loglikelihood(pairs) == [(-2.0, False), (-1.0, True), (-3.0, False)]
            assert model.loglikelihood_rolling(single) == [-10.0, -20.0]
            assert model.generate_until(writing) == ["p1 p2", "q1 q2. and", "r1 r2", "s1 s2", "t1 t2. and\nmore"]
    assert scripted.asked == [
        ("a", "bb"), ("c", "c"), ("a", "bbb"), ("a",), ("dd",),
        (["p", "r"], 7, short), (["s"], 7, short), (["q"], 256, long), (["t"], 256, {}),
    ]  # fmt: skip


def test_what_cannot_be_scored_is_one_clear_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        ("mdlm", ["--draws", "0"], "draws is 0"), ("mdlm", ["--noise_temperature", "0.5"], "takes no noise"),
        ("mdlm", ["--tasks", ","], "tasks is ','"), ("heldout", [], "is neither a student"), ("mtp-row", [], "last 2 tokens of whole rows alone"),
    ]  # fmt: skip
    for name, options, message in cases:
        assert main(["zero-shot", "--student", str(world / name), "--output", str(tmp_path), "--device", "cpu", *options]) == 1, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
