"""Zero-shot tasks: our students as models of EleutherAI's lm-eval (`pip install lm_eval`).

    python -m eval zero-shot --student runs/demo/students/mdlm --output runs/demo --tasks arc_easy,piqa --draws 64
    python -m eval zero-shot --student STUDENT --output FOLDER                                  the standard list, where the hub is reachable
    python -m eval zero-shot --student STUDENT --output FOLDER --tasks mine --task_folder DIR   a task of your own: DIR/mine.yaml, in lm-eval's format

A likelihood is exact for ar and mtp, and for bd3lm where `draws` are enough for all masks of a block (then all orders in which its tokens
can be revealed are summed); else it is a bound by Monte Carlo, of as many draws as asked for; see likelihood for which bound it is.
Posterior noise would leak the answer, so students with noise are given independent prior noise, and pay for what they believe of it: their
figures understate them. What is written (generate_until) comes from the samplers of `sample`.
Each answer is kept in the output folder as it is found, so the same command continues where it was stopped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval import tables
from eval.answering import TextStudent
from eval.config import SampleConfig
from eval.ledger import Ledger, key_of
from eval.progress import Progress
from noise.storage import DatasetError, canonical_json, read_json, write_json

STANDARD = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "social_iqa", "boolq")
"""lm-eval's names of ARC easy and challenge, HellaSwag, PIQA, WinoGrande, OpenBookQA, SocialIQA and BoolQ."""
UNDERSTATES = (
    "note: the noise is drawn from the prior, which knows nothing of the answer; a student pays for what it believes of it, so these figures "
    "understate it: compare them with those of other students with noise and the same draws, not with its twin's without"
)


@dataclass
class ZeroShotConfig:
    """Accuracy of one student on tasks of lm-eval, without training on them."""

    student: str
    """Folder of a trained mdlm, bd3lm, mtp or ar student, or a causal LM: a folder or hub id."""
    output: str
    """Folder of the results and of the answers that are kept."""
    tasks: str = "standard"
    """Names of lm-eval's tasks, with commas between them. standard: ARC easy and challenge, HellaSwag, PIQA, WinoGrande, OpenBookQA,
    SocialIQA and BoolQ."""
    task_folder: str = ""
    """Folder of more tasks: YAML files in lm-eval's format."""
    draws: int = 32
    """Masks, and noise, behind each bound. Blocks of B tokens have 2^B - 1 masks: from that many draws on a bd3lm student's likelihood is exact, or
    with noise exact for each of so many draws of it (forwards: draws x masks)."""
    noise_temperature: float = 1.0
    """Multiplies the noise given to the student; near 0 it is silent, and the student is another one."""
    fewshot: int = -1
    """Examples before each question; -1: as the task has it."""
    limit: int = 0
    """Questions of each task, at most; 0: all."""
    nfe: int = 0
    """As in `eval sample`, for tasks in which the student writes."""
    tokenizer: str = ""
    """Folder of the student's tokenizer; empty: tokenizer/ in the dataset it was trained on, or a causal LM's own."""
    bos: int = -1
    """Token at position 0; -1: BOS of the tokenizer, or EOS where it has none."""
    seed: int = 1
    """Names masks, noise and what is written."""
    batch: int = 64
    """Texts written together."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError(f"tasks is {self.tasks!r}; name tasks of lm-eval with commas between them, or standard")
        for name, least in (("fewshot", -1), ("limit", 0), ("batch", 1), ("nfe", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def names(self) -> list[str]:
        return list(STANDARD) if self.tasks == "standard" else [name.strip() for name in self.tasks.split(",") if name.strip()]


def zero_shot(config: ZeroShotConfig) -> Path:
    """Score the tasks, print the table, and write results, settings and task versions as JSON; returns where."""
    writing = SampleConfig(
        config.student, config.output, config.bos, config.tokenizer, nfe=config.nfe, choose="argmax", seed=config.seed, device=config.device
    )
    student = TextStudent(writing, config.draws, config.noise_temperature)
    harness = _harness()
    drawn = {} if student.exact else {"draws": config.draws, "seed": str(config.seed), "noise_temperature": config.noise_temperature}
    request = {"model": student.identity, "bos": student.bos, "longest": student.longest, "likelihood": student.about, **drawn}
    settings = {**request, "fewshot": config.fewshot, "limit": config.limit, "nfe": config.nfe, "lm_eval": harness.version}
    path = _path(config, settings).with_suffix(".json")
    with Ledger(_path(config, request).with_suffix(".jsonl")) as ledger:
        try:
            found = harness.simple_evaluate(
                model=_model(student, config, ledger),
                tasks=config.names,
                num_fewshot=config.fewshot if config.fewshot >= 0 else None,
                limit=config.limit or None,
                log_samples=False,
                bootstrap_iters=1000,
                task_manager=harness.TaskManager(include_path=config.task_folder or None),
            )
        except (KeyError, ConnectionError) as error:
            raise DatasetError(
                f"tasks {', '.join(config.names)} cannot be read ({error}); where the hub is out of reach, give --task_folder"
            ) from None
    _save(path, {"settings": settings, "likelihood": student.about, **{name: found[name] for name in ("results", "versions", "n-shot", "n-samples")}})
    print(harness.make_table(found))
    print(f"likelihood: {student.about}\nresults: {path}")
    if student.noisy:
        print(UNDERSTATES)
    return path


def _path(config: ZeroShotConfig, request: dict[str, Any]) -> Path:
    return tables.piece(Path(config.output) / "zero-shot", Path(config.student).name, request)


def _save(path: Path, found: dict[str, Any]) -> None:
    """Beside what earlier commands found of other tasks with the same settings."""
    before = read_json(path) if path.exists() else {}
    write_json(path, {name: {**before.get(name, {}), **part} if isinstance(part, dict) else part for name, part in found.items()})


def _model(student: TextStudent, config: ZeroShotConfig, ledger: Ledger) -> Any:
    """The student as lm-eval's LM; every answer goes through the ledger."""
    from lm_eval.api.model import LM

    class Model(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [(log_p, greedy) for log_p, greedy in self._each("loglikelihood", requests, student.log_likelihood)]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return self._each("rolling", requests, student.rolling)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return _written(student, config, ledger, requests)

        def _each(self, kind: str, requests: list[Any], find: Callable[..., Any]) -> list[Any]:
            progress, answers = Progress(len(requests)), []
            progress.begin(kind)
            for request in requests:
                key = key_of([kind, *request.args])
                if key in ledger:
                    progress.skip(1)
                else:
                    ledger.add(key, find(*request.args))
                    progress.advance(1)
                answers.append(ledger[key])
            progress.close()
            return answers

    return Model()


def _written(student: TextStudent, config: ZeroShotConfig, ledger: Ledger, requests: list[Any]) -> list[str]:
    """Texts in batches that share their settings, cut at the first of `until`."""
    keys = [key_of(["written", config.seed, config.nfe, *request.args]) for request in requests]
    groups: dict[str, list[int]] = defaultdict(list)
    for number, (key, request) in enumerate(zip(keys, requests, strict=True)):
        if key not in ledger:
            groups[canonical_json(request.args[1])].append(number)
    for numbers in groups.values():
        settings = requests[numbers[0]].args[1]
        stops = [settings["until"]] if isinstance(settings.get("until"), str) else settings.get("until", [])
        for start in range(0, len(numbers), config.batch):
            part = numbers[start : start + config.batch]
            texts = student.write([requests[number].args[0] for number in part], int(settings.get("max_gen_toks", 256)), settings)
            for number, text in zip(part, texts, strict=True):
                ledger.add(keys[number], min((text.split(stop)[0] for stop in stops if stop), key=len, default=text))
    return [ledger[key] for key in keys]


@dataclass(frozen=True)
class _Harness:
    simple_evaluate: Any
    TaskManager: Any
    make_table: Any
    version: str


def _harness() -> _Harness:
    try:
        from importlib.metadata import version

        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise DatasetError(f"zero-shot tasks need EleutherAI's lm-eval ({error}): pip install lm_eval, then run the same command again") from None
    return _Harness(simple_evaluate, TaskManager, make_table, version("lm_eval"))
