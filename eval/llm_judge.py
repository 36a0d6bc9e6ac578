"""A language model as judge of samples: pairs against a baseline, and grades, for clarity, factuality and grammar.

    python -m eval judge --samples runs/demo/samples/A.arrow runs/demo/samples/B.arrow --tokenizer runs/demo/tokenizer \
        --endpoint https://host/v1 --model NAME --output runs/demo/judged --price_per_million 0.6
    python -m eval judge --samples a.txt b.txt --model FOLDER_OR_HUB_ID --output runs/judged         a local causal LM

Sample sets are Arrow files of `sample`, text files of one text a line, or JSONL with {"text": ...}. The first is the baseline: text i of every other
set is compared with its text i, in both orders, of which the seed says which is asked first. The key is read from an environment variable.
Prompts are files. What it will cost is said before the first request, and has to be agreed to (--yes: it is).
Every answer is kept as it arrives, under a hash of prompt, texts and model: the same command asks only what is missing. Answers that
say nothing and questions that are refused are counted beside each figure, never dropped in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from eval import chat, judgements
from eval.ledger import Ledger, key_of
from eval.metrics import bootstrap_weights
from eval.progress import Progress
from eval.questions import Prompt, Question, grades, pairs
from eval.show import show_figures
from eval.study import device_of
from eval.texts import read_texts
from noise.storage import canonical_json, sha256_text, write_json, write_text

CHARACTERS_PER_TOKEN = 4
"""Of the estimate of what it costs."""


@dataclass
class LlmJudgeConfig:
    """Clarity, factuality and grammar of sample sets, as a language model sees them."""

    samples: list[str] = field(default_factory=list)
    """Arrow sets of `eval sample`, or text files; the first is the baseline of the pairs."""
    output: str = ""
    """Folder of judge.json, judgements.jsonl and the answers that are kept."""
    model: str = ""
    """Name of the model at the endpoint; without an endpoint a local causal LM: a folder or hub id."""
    endpoint: str = ""
    """Address under which chat/completions is found, such as https://host/v1. Empty: the model is local."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; unset: no key is sent."""
    mode: Literal["both", "pairwise", "graded"] = "both"
    """pairwise: each set against the baseline. graded: each text by itself, from 1 to 10."""
    criteria: list[str] = field(default_factory=lambda: ["clarity", "factuality", "grammar"])
    """What is judged, each for itself."""
    pairwise_prompt: str = "recipes/judge/pairwise.txt"
    """File with {first}, {second} and {criteria}."""
    graded_prompt: str = "recipes/judge/graded.txt"
    """File with {text} and {criteria}."""
    both_orders: bool = True
    """Ask each pair twice, with the texts exchanged; else once, in an order that the seed chooses."""
    texts: int = 100
    """Texts of each set, from its start; 0: as many as the smallest set has."""
    tokenizer: str = ""
    """Folder of the tokenizer of Arrow sets."""
    seed: int = 1
    """Names the orders, and the bootstrap."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval; texts are drawn, with all that was asked of each."""
    max_tokens: int = 256
    """Tokens of an answer, at most."""
    parallel: int = 4
    """Requests at a time."""
    timeout: float = 60.0
    """Seconds until a request counts as failed."""
    attempts: int = 6
    """How often a request is made before the run stops."""
    price_per_million: float = 0.0
    """Price of a million tokens, of questions and answers alike, for the estimate; 0: not known."""
    yes: bool = False
    """Go on without asking, once the cost is shown."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of a local model. auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("samples", "output", "model", "criteria"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give --{name}")
        if len(self.samples) < 2 and self.mode == "pairwise":
            raise ValueError(f"samples is {self.samples}; pairs need a baseline and at least one set beside it")
        if len(set(self.samples)) < len(self.samples):
            raise ValueError(f"samples is {self.samples}; give each set once")
        for name, least in (("texts", 0), ("max_tokens", 1), ("parallel", 1), ("attempts", 1), ("replicates", 20), ("price_per_million", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.timeout <= 0:
            raise ValueError(f"timeout is {self.timeout}; it must be above 0")
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name in ("key_variable", "parallel", "timeout", "attempts"):
            if not self.endpoint and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is {getattr(self, name)}, but a local model is sent no requests; drop it, or give --endpoint")
        if self.endpoint and self.device != "auto":
            raise ValueError(f"device is {self.device}, but endpoint {self.endpoint} computes elsewhere; drop one of them")


def judge(config: LlmJudgeConfig) -> None:
    """Ask what is missing, then print and write the figures: judge.json, and judgements.jsonl with the order and verdict of every question."""
    names = _names(config.samples)
    texts = [read_texts(Path(path), config.tokenizer, config.texts) for path in config.samples]
    count = min(map(len, texts))
    questions, prompts = _questions(config, names, [part[:count] for part in texts])
    model = _model(config)
    with Ledger(Path(config.output) / "answers.jsonl") as ledger:
        keys = [key_of({"question": question.prompt, "model": model.identity}) for question in questions]
        missing = {key: question.prompt for key, question in zip(keys, questions, strict=True) if key not in ledger}
        if missing:
            _agree(config, list(missing.values()), len(questions))
            refused = _ask(model, missing, ledger, config.parallel if config.endpoint else 1)
        else:
            refused = {}
        answers = [ledger[key]["text"] if key in ledger else None for key in keys]
    verdicts = [None if answer is None else question.read(answer, config.criteria) for question, answer in zip(questions, answers, strict=True)]
    weights = bootstrap_weights(count, config.replicates, config.seed)
    found = judgements.build(questions, verdicts, [answer is None for answer in answers], names, config.criteria, weights)
    kept = {name: value for name, value in asdict(config).items() if name not in ("yes", "output", "parallel", "timeout", "attempts")}
    digests = {name: sha256_text(canonical_json(part[:count])) for name, part in zip(names, texts, strict=True)}
    prompts_kept = {prompt.name: prompt.sha256 for prompt in prompts}
    refusals = sorted(set(refused.values()))
    write_json(
        Path(config.output) / "judge.json",
        {"settings": kept, "judge": model.identity, "prompts": prompts_kept, "texts": digests, "sequences": count, "refusals": refusals, **found},
    )
    write_text(Path(config.output) / "judgements.jsonl", judgements.lines(questions, verdicts, answers))
    show_figures(judgements.table(found))
    for reason in refusals:
        print(f"refused: {reason}", file=sys.stderr)
    print(f"figures: {Path(config.output) / 'judge.json'}")


def _names(paths: Sequence[str]) -> list[str]:
    """The files' own names where they differ, else the paths."""
    names = [Path(path).stem for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _questions(config: LlmJudgeConfig, names: list[str], texts: list[list[str]]) -> tuple[list[Question], list[Prompt]]:
    questions: list[Question] = []
    prompts: list[Prompt] = []
    if config.mode != "graded" and len(names) > 1:
        prompts.append(Prompt.read(config.pairwise_prompt, ("first", "second"), config.criteria))
        for name, part in zip(names[1:], texts[1:], strict=True):
            questions += pairs(prompts[-1], name, texts[0], part, config.both_orders, config.seed)
    if config.mode != "pairwise":
        prompts.append(Prompt.read(config.graded_prompt, ("text",), config.criteria))
        for name, part in zip(names, texts, strict=True):
            questions += grades(prompts[-1], name, part)
    return questions, prompts


def _model(config: LlmJudgeConfig) -> chat.Chat:
    if config.endpoint:
        return chat.Endpoint(config.endpoint, config.model, config.key_variable, config.max_tokens, config.timeout, config.attempts)
    return chat.Local(config.model, config.max_tokens, device_of(config.device))


def _agree(config: LlmJudgeConfig, prompts: list[str], all_questions: int) -> None:
    """Say what it will cost; go on where that is agreed to. Raises ValueError where it is not, or nobody can be asked."""
    read, written = sum(map(len, prompts)) // CHARACTERS_PER_TOKEN, len(prompts) * config.max_tokens
    said = f"{len(prompts)} requests of {all_questions} (the others are answered): about {read:,} tokens to read, at most {written:,} to write"
    if config.price_per_million:
        said += f", at most about {(read + written) * config.price_per_million / 1e6:.2f} at {config.price_per_million:g} a million tokens"
    print(said, flush=True)
    if config.yes or not config.endpoint:
        return
    if not sys.stdin.isatty():
        raise ValueError("nobody is here to agree to that cost; look at it, and give --yes true")
    if input("go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("not agreed to; nothing was asked")


def _ask(model: chat.Chat, missing: dict[str, str], ledger: Ledger, parallel: int) -> dict[str, str]:
    """Answers into the ledger, each as it arrives; returns the reasons of those that were refused. A failure ends the run."""
    refused: dict[str, str] = {}

    def one(key: str, prompt: str) -> None:
        try:
            answer = model.ask(prompt)
        except chat.RefusedError as refusal:
            refused[key] = str(refusal)
            return
        ledger.add(key, asdict(answer))

    progress = Progress(len(missing))
    progress.begin("questions")
    with ThreadPoolExecutor(parallel) as pool:
        try:
            for done in as_completed([pool.submit(one, key, prompt) for key, prompt in missing.items()]):
                done.result()
                progress.advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.close()
    return refused
