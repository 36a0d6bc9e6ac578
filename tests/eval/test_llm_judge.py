"""A judge behind a chat-completions server on this machine: both orders, what is cached, what fails, what is never said."""

from __future__ import annotations

import email.utils
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval import chat, judgements, tables
from eval.__main__ import main
from eval.questions import Prompt, Question, pairs
from tests.eval.world import random_rows, write_causal, write_letter_tokenizer, write_tokenizer

KEY = "hush-hush-0123456789"
A, B = [f"text {i} plain" for i in range(8)], [f"text {i} good" for i in range(8)]
Reply = tuple[int, dict[str, str], bytes]


def says(value: Any) -> Reply:
    """A chat completion whose text is the value's JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    body = {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"total_tokens": 7}}
    return 200, {}, json.dumps(body).encode()


def shown(prompt: str) -> list[str]:
    return re.findall(r"<<<\n(.*?)\n>>>", prompt)


def opinion(prompt: str) -> str:
    """Prefers what is good, finds grammar equal, and grades good texts twice as high."""
    texts = shown(prompt)
    if len(texts) == 1:
        return json.dumps({"clarity": 8 if "good" in texts[0] else 4, "factuality": 5, "grammar": 6})
    better = "A" if "good" in texts[0] else "B"
    return f"Let me think {{not json}}.\n```json\n{json.dumps({'clarity': better, 'factuality': better, 'grammar': 'Tie'})}\n```"


def honest(prompt: str) -> Reply:
    return says(opinion(prompt))


class Server:
    """Answers as `reply` says; remembers what was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[str], Reply] = honest
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.keys.add(self.headers.get("authorization"))
                outer.asked.append(body)
                assert self.path == "/v1/chat/completions"
                status, headers, content = outer.reply(body["messages"][0]["content"])
                if status == 0:
                    outer.hold.wait(20)
                    return
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self.hold = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.hold.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("JUDGE_WORD", KEY)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(chat, "sleep", found.append)
    return found


def judged(server: Server, folder: Path, *options: str) -> int:
    for name, texts in (("plain", A), ("good", B)):
        if not (folder / f"{name}.txt").exists():
            (folder / f"{name}.txt").write_text("\n".join(texts))
    common = ["judge", "--samples", str(folder / "plain.txt"), str(folder / "good.txt"), "--output", str(folder / "out"), "--model", "wise",
              "--endpoint", server.address, "--key_variable", "JUDGE_WORD", "--yes", "true", "--timeout", "5"]  # fmt: skip
    return main([*common, *options])


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "judge.json").read_text())
    return found


def test_an_honest_judge_is_understood_in_both_orders(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(server, tmp_path, "--price_per_million", "1000") == 0
    found = figures(tmp_path)
    clarity, grammar = found["pairwise"]["good"]["clarity"], found["pairwise"]["good"]["grammar"]
    assert clarity["win_rate"] == {"value": 1.0, "low": 1.0, "high": 1.0} and (clarity["wins"], clarity["losses"]) == (16, 0)
    assert clarity["first_preferred"] == 0.5 and clarity["orders_agree"] == 1
    assert grammar["win_rate"]["value"] == 0.5 and grammar["ties"] == 16 and grammar["first_preferred"] is None
    graded = found["graded"]
    assert graded["plain"]["clarity"]["grade"]["value"] == 4 and graded["good"]["clarity"]["of_baseline"]["value"] == 2
    assert graded["good"]["factuality"]["of_baseline"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    out = capsys.readouterr().out
    assert "32 requests of 32" in out and "a million tokens" in out and out.index("32 requests") < out.index("win rate")
    assert {body["model"] for body in server.asked} == {"wise"} and {body["temperature"] for body in server.asked} == {0}


def test_which_text_is_shown_first_is_the_seeds_choice_and_is_recorded(server: Server, tmp_path: Path) -> None:
    assert judged(server, tmp_path, "--mode", "pairwise", "--both_orders", "false", "--parallel", "1") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    first = [shown(body["messages"][0]["content"])[0] for body in server.asked]
    assert [row["swapped"] for row in rows] == ["good" in text for text in first] and len({row["swapped"] for row in rows}) == 2
    prompt = Prompt("p", "{first}|{second}|{criteria}", ("clarity",))
    many = [question.swapped for question in pairs(prompt, "s", ["a"] * 400, ["b"] * 400, False, seed=1)]
    assert 160 < sum(many) < 240 and many != [question.swapped for question in pairs(prompt, "s", ["a"] * 400, ["b"] * 400, False, seed=2)]
    both = pairs(prompt, "s", ["a"], ["b"], True, seed=1)
    assert {question.prompt for question in both} == {"a|b|clarity", "b|a|clarity"}


def test_a_judge_that_likes_what_it_sees_first_prefers_nobody(server: Server, tmp_path: Path) -> None:
    server.reply = lambda prompt: says({"clarity": "A", "factuality": "A", "grammar": "A"})
    assert judged(server, tmp_path, "--mode", "pairwise") == 0
    clarity = figures(tmp_path)["pairwise"]["good"]["clarity"]
    assert clarity["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5} and clarity["first_preferred"] == 1 and clarity["orders_agree"] == 0


def test_nothing_is_asked_twice_and_another_model_prompt_or_text_is_asked_anew(server: Server, tmp_path: Path) -> None:
    assert judged(server, tmp_path) == 0
    first = figures(tmp_path)
    assert len(server.asked) == 32 and judged(server, tmp_path) == 0 and len(server.asked) == 32
    assert figures(tmp_path) == first
    assert judged(server, tmp_path, "--model", "wiser", "--mode", "graded") == 0 and len(server.asked) == 48
    (tmp_path / "mine.txt").write_text("{criteria} of {text}, as in <<<\n{text}\n>>>")
    assert judged(server, tmp_path, "--graded_prompt", str(tmp_path / "mine.txt"), "--mode", "graded") == 0 and len(server.asked) == 64
    assert figures(tmp_path)["prompts"][str(tmp_path / "mine.txt")] not in first["prompts"].values()
    (tmp_path / "good.txt").write_text("\n".join([*B[:7], "another text"]))
    assert judged(server, tmp_path) == 0 and len(server.asked) == 64 + 3


def test_a_run_that_is_stopped_goes_on_with_what_is_missing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = chat.Endpoint.ask

    def stopping(self: chat.Endpoint, question: str) -> chat.Answer:
        if len(server.asked) == 10:
            raise KeyboardInterrupt
        return real(self, question)

    with monkeypatch.context() as patch:
        patch.setattr(chat.Endpoint, "ask", stopping)
        assert judged(server, tmp_path, "--parallel", "1") == 130
    kept = tmp_path / "out" / "answers.jsonl"
    assert len(kept.read_bytes().splitlines()) == 10
    with kept.open("ab") as file:
        file.write(b'{"key": "cut off in the mid')
    assert judged(server, tmp_path) == 0
    asked = [body["messages"][0]["content"] for body in server.asked]
    assert len(asked) == len(set(asked)) == 32


def test_answers_that_say_nothing_and_refusals_are_counted(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(prompt: str) -> Reply:
        text = shown(prompt)[-1]
        odd = {"0": says("I like both."), "1": says({"clarity": "C", "factuality": "A", "grammar": "A"}), "2": says('{"clarity": "A"'), "3": says("")}
        if " 4 " in text:
            return 400, {}, b"the filter says no"
        return odd.get(text.split()[1]) or honest(prompt)

    server.reply = reply
    assert judged(server, tmp_path) == 0
    pairwise, graded = figures(tmp_path)["pairwise"]["good"], figures(tmp_path)["graded"]["plain"]
    assert (pairwise["questions"], pairwise["unreadable"], pairwise["refused"]) == (16, 8, 2) and pairwise["clarity"]["wins"] == 6
    assert (graded["questions"], graded["unreadable"], graded["refused"]) == (8, 4, 1) and graded["clarity"]["grade"]["value"] == 4
    out, error = capsys.readouterr()
    assert "16 asked, 8 answers unreadable, 2 refused" in out and "the filter says no" in error
    server.reply = lambda prompt: says("no idea")
    assert judged(server, tmp_path, "--model", "fool") == 0
    assert "no answer could be read" in capsys.readouterr().out and figures(tmp_path)["pairwise"]["good"]["clarity"]["win_rate"] is None


def test_failures_that_pass_are_waited_out(server: Server, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    failures: list[Reply] = [
        (429, {"Retry-After": "17"}, b"slow down"),
        (503, {}, b""),
        (200, {}, b"<html>"),
        (200, {}, b'{"choices": []}'),
        (429, {"Retry-After": date}, b""),
    ]
    server.reply = lambda prompt: failures.pop(0) if failures else honest(prompt)
    assert judged(server, tmp_path, "--mode", "graded", "--parallel", "1") == 0
    assert waits == [17, 2, 4, 8, chat.LONGEST_WAIT] and len(server.asked) == 5 + 16
    assert figures(tmp_path)["graded"]["good"]["unreadable"] == 0


@pytest.mark.parametrize(("reply", "message"), [
    ((500, {}, b"broken " + KEY.encode()), "failed 3 times, at last with status 500: broken ***"),
    ((401, {}, b"who is " + KEY.encode()), "refuses: status 401: who is ***"),
    ((0, {}, b""), "failed 3 times, at last with TimeoutError"),
])  # fmt: skip
def test_failures_that_stay_end_the_run_with_one_line_that_hides_the_key(
    server: Server, tmp_path: Path, waits: list[float], capsys: pytest.CaptureFixture[str], reply: Reply, message: str
) -> None:
    server.reply = lambda prompt: honest(prompt) if " 0 " in prompt else reply
    options = ["--mode", "graded", "--attempts", "3", "--parallel", "1", *(["--timeout", "0.2"] if not reply[0] else [])]
    assert judged(server, tmp_path, *options) == 1
    error = capsys.readouterr().err
    assert message in error and KEY not in error and error.count("\n") == 1
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 1


def test_the_key_is_sent_and_kept_nowhere(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(server, tmp_path) == 0 and server.keys == {f"Bearer {KEY}"}
    assert all(KEY not in path.read_text() for path in (tmp_path / "out").iterdir())
    assert judged(server, tmp_path, "--key_variable", "sk-0123456789") == 1 and "sk-0123456789" not in capsys.readouterr().err
    assert judged(server, tmp_path, "--endpoint", "https://me:word@host/v1") == 1 and "me:word" not in capsys.readouterr().err


def test_nothing_is_asked_before_the_cost_is_agreed_to(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert judged(server, tmp_path, "--yes", "false") == 1 and "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert judged(server, tmp_path, "--yes", "false") == 1 and not server.asked
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert judged(server, tmp_path, "--yes", "false") == 0 and len(server.asked) == 32


def test_intervals_draw_texts_and_hold_the_truth() -> None:
    rng = np.random.default_rng(3)
    won = rng.random(400) < 0.7
    questions = [Question("", "pairwise", "s", i, order) for i in range(400) for order in (False, True)]
    verdicts = [{"clarity": float(won[question.number])} for question in questions]
    weights = np.concatenate([np.ones((1, 400)), rng.multinomial(400, np.full(400, 1 / 400), size=500)])
    rate = judgements.build(questions, verdicts, [False] * 800, ["base", "s"], ["clarity"], weights)["pairwise"]["s"]["clarity"]["win_rate"]
    half = 1.96 * (0.7 * 0.3 / 400) ** 0.5  # 400 pairs, though there are 800 answers
    assert rate["value"] == pytest.approx(won.mean()) and rate["high"] - rate["low"] == pytest.approx(2 * half, rel=0.15)


def test_what_a_text_holds_is_never_a_place_of_the_prompt() -> None:
    prompt = Prompt("p", "{first} and {second}: {criteria}", ("grammar",))
    assert prompt.filled(first="{second}", second="{criteria} {first}") == "{second} and {criteria} {first}: grammar"


def write_chat_model(folder: Path) -> Any:
    """A tiny causal LM of bytes with a chat template; returns its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_alone = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytes_alone.pre_tokenizer, bytes_alone.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytes_alone.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[judge]{% endif %}"
    write_causal(folder, seed=1, vocab_size=len(letters), context=4096)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_local_model_is_asked_through_its_chat_template_and_its_verdicts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = write_chat_model(tmp_path / "local")
    asked: list[str] = []

    def generate(model: Any, given_1L: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        asked.append(tokenizer.decode(given_1L[0]))
        answer = [*tokenizer.encode(opinion(asked[-1]), add_special_tokens=False), tokenizer.eos_token_id]
        assert len(answer) <= max_new_tokens
        return torch.cat([given_1L, torch.tensor([answer])], 1)

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", generate)
    for name, texts in (("plain", A[:3]), ("good", B[:3])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    sets = [str(tmp_path / "plain.txt"), str(tmp_path / "good.txt")]
    arguments = ["judge", "--samples", *sets, "--output", str(tmp_path / "out"), "--model", str(tmp_path / "local"), "--device", "cpu"]
    assert main(arguments) == 0
    assert len(asked) == 12 and all(re.fullmatch(r"<s>\[user\](?!.*<s>).*\[judge\]", question, re.DOTALL) for question in asked)
    pairwise, graded = figures(tmp_path)["pairwise"]["good"], figures(tmp_path)["graded"]
    assert pairwise["unreadable"] == 0 and pairwise["clarity"]["wins"] == pairwise["grammar"]["ties"] == 6
    assert {name: found["clarity"]["grade"]["value"] for name, found in graded.items()} == {"plain": 4, "good": 8}
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert sorted(answer["value"]["text"] for answer in answers) == sorted(map(opinion, asked))


def test_arrow_sets_are_decoded_and_a_local_model_judges_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        ids = random_rows(3, 6, seed)
        tables.write(tmp_path / f"{name}.arrow", {"input_ids": ids, "length": np.full(3, 6)}, {})
    write_tokenizer(tmp_path / "tokenizer")
    write_causal(tmp_path / "local", seed=1, vocab_size=13, context=4096)
    write_letter_tokenizer(tmp_path / "local")
    (tmp_path / "short.txt").write_text("{text} {criteria}")
    sets = [str(tmp_path / "one.arrow"), str(tmp_path / "two.arrow")]
    arguments = ["judge", "--samples", *sets, "--output", str(tmp_path / "out"), "--mode", "graded", "--max_tokens", "4", "--device", "cpu"]
    arguments += ["--model", str(tmp_path / "local"), "--graded_prompt", str(tmp_path / "short.txt")]
    assert main(arguments) == 1 and "--tokenizer" in capsys.readouterr().err
    arguments += ["--tokenizer", str(tmp_path / "tokenizer")]
    for name, value in (("key_variable", "KEY"), ("parallel", "2"), ("timeout", "5.0"), ("attempts", "3")):
        assert main([*arguments, f"--{name}", value]) == 1
        assert f"{name} is {value}, but a local model is sent no requests" in capsys.readouterr().err
    assert main([*arguments, "--endpoint", "http://127.0.0.1:1/v1"]) == 1
    assert "device is cpu, but endpoint http://127.0.0.1:1/v1 computes elsewhere" in capsys.readouterr().err
    assert main(arguments) == 0
    found = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert found["graded"]["one"]["unreadable"] == 3 and found["judge"]["local"]["weights"] and found["sequences"] == 3
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 6
