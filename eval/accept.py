"""How many tokens a drafter saves its teacher: exact samples in fewer teacher calls, counted and timed.

    python -m eval accept --student STUDENT --teacher TEACHER --output FOLDER            samples from BOS
    python -m eval accept --student '[MDLM, MEDUSA, BD3LM, SMALL_LM]' ...                several drafters, the same noise, the same run
    python -m eval accept ... --prompts prompts.jsonl --length 64                        samples that go on from prompts
    python -m eval accept ... --rows DATASET                                             held-out rows and their own noise
    python -m eval accept ... --block 8 --nfe 2 --batch 4                                longer drafts in two forwards, 4 rows together

The drafter guesses the next `block` tokens, one forward of the teacher judges them all, and what stands is kept with the teacher's own next token.
Noise is shared: the text is exactly what the teacher alone writes from that noise, argmax(log p + g) token by token, whatever was drafted. Drafters
without noise are also run with the rejection rule of speculative sampling (arXiv 2211.17192), which is exact in distribution.

accept.json has tokens per teacher call, how often the k-th drafted token stands (of all that were drafted, and of those whose predecessors stood),
the same for every position of the row, forwards of the drafter, and the time against plain sampling of the teacher with its KV cache, which runs
on the same rows, batch by batch in turn. Brackets are 95% bootstrap intervals over sequences. In float64 every token must equal plain
sampling's; in float32 all but near ties, which are listed; in bfloat16 and float16 the share of rows that differ is reported.
Finished batches are kept: the same command continues where it was stopped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval import samples, tables
from eval.accept_figures import figures
from eval.accept_rows import Begun, Source, source_of
from eval.causal import CausalLM, folder_identity, model_identity
from eval.config import AcceptConfig
from eval.drafters import CausalDrafter, drafter_of
from eval.metrics import Array, bootstrap_weights
from eval.progress import Progress
from eval.referee import Held, Rejection, Rule, SharedNoise
from eval.speculative import Drafter, Written, speculate
from eval.study import device_of
from noise import philox
from noise.identity import differences
from noise.storage import DatasetError, read_json, weights_hash, write_json
from pipeline.config import Teacher as TeacherConfig
from pipeline.generate import write
from pipeline.replay import tolerance
from pipeline.teacher import locate
from pipeline.tokenizer import tokenizer_hash
from trainer.students import load_student

SHARED, REJECTION = "shared noise", "rejection"


@dataclass(frozen=True)
class System:
    """A drafter under a rule."""

    name: str
    rule: str
    drafter: Drafter
    noisy: bool
    """whether the drafter reads noise"""


def build(config: AcceptConfig) -> dict[str, Any]:
    """accept.json. Raises DatasetError or ValueError, before the first forward, for models and rows that do not fit together."""
    device = device_of(config.device)
    teacher = CausalLM(config.teacher, device, config.dtype)
    students = {name: _load(name, teacher, device) for name in config.students}
    systems = _systems(config, students)
    longest = {name: student.max_length if isinstance(student, CausalLM) else student.block_length for name, student in students.items()}
    source = source_of(config, teacher, {**longest, teacher.name: teacher.max_length})
    sequences = config.sequences or (source.count if config.prompts else 64)
    if config.rows:
        sequences = min(sequences, source.count)
    request = {
        "format_version": samples.FORMAT_VERSION, "teacher": teacher.identity, "dtype": config.dtype, "rows": source.request,
        "students": [model_identity(name) if not _about(name) else folder_identity(Path(name)) for name in config.students],
        "block": config.block, "nfe": config.nfe, "sight": config.sight, "seed": str(config.seed), "sequences": sequences, "batch": config.batch,
        "device": device,
    }  # fmt: skip
    path = tables.piece(Path(config.output) / "accept", Path(config.teacher).name, request)
    run = Run(config, teacher, systems, source)
    progress = Progress(sequences)
    progress.begin("drafting")
    if not path.exists():
        run.warm_up()
    columns = samples.obtain_columns(path, request, sequences, config.batch, run.draw, progress.advance)
    progress.close()
    labels = [(system.name, system.rule) for system in systems]
    report = figures(labels, columns, bootstrap_weights(sequences, config.replicates, config.seed), config.dtype, tolerance(config.dtype))
    report["settings"] = {name: getattr(config, name) for name in ("teacher", "rows", "prompts", "block", "nfe", "sight", "dtype", "seed", "batch")}
    report["settings"] |= {"length": source.length, "sequences": sequences}
    report["request"], report["samples"] = request, str(path)
    write_json(Path(config.output) / "accept.json", report)
    return report


class Run:
    """Plain sampling and every system on the same rows, in turn."""

    def __init__(self, config: AcceptConfig, teacher: CausalLM, systems: list[System], source: Source):
        self._config, self._teacher, self._systems, self._source = config, teacher, systems, source

    def draw(self, number_B: Tensor) -> dict[str, Array]:
        """What `figures` reads of these rows; who begins changes from batch to batch."""
        begun = self._source.begin(number_B)
        jobs = [None, *self._systems]
        first = int(number_B[0]) // self._config.batch % len(jobs)
        found: dict[int, Any] = {}
        seconds: dict[int, float] = {}
        for at in [*range(first, len(jobs)), *range(first)]:
            started = time.perf_counter()
            system = jobs[at]
            found[at] = self._plain(begun) if system is None else self._drafted(begun, system)
            if self._teacher.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[at] = (time.perf_counter() - started) / len(number_B)
        columns = {"input_ids": found[0].int(), "length": begun.limit_B, "tokens": begun.limit_B - begun.given_B, "given": begun.given_B}
        if begun.text_BL is not None:
            columns["is_text"] = (found[0] == begun.text_BL).all(1).int()
        columns["seconds"] = torch.full(begun.limit_B.shape, seconds[0], dtype=torch.float64)
        for at, system in enumerate(self._systems, start=1):
            columns |= {f"{at}/{name}": column for name, column in self._columns(begun, system, found[0], found[at]).items()}
            columns[f"{at}/seconds"] = torch.full(begun.limit_B.shape, seconds[at], dtype=torch.float64)
        return {name: column.cpu().numpy() for name, column in columns.items()}

    def warm_up(self) -> None:
        """A few tokens of each, so that no system pays for what is done once."""
        begun = self._source.begin(torch.zeros(1, dtype=torch.int64))
        limit_B = torch.minimum(begun.limit_B, begun.given_B + 2 * (self._config.block + 1))
        short = Begun(begun.given_BP, begun.given_B, limit_B, begun.sequence_id_B, begun.noise, None)
        self._plain(short)
        for system in self._systems:
            self._drafted(short, system)

    def _rule(self, begun: Begun, span: int, rule: str = SHARED) -> Any:
        held = Held(begun.noise, len(begun.given_B), span, self._teacher.vocab_size, self._teacher.device)
        log_probs = self._source.log_probs()
        if rule == SHARED:
            return SharedNoise(log_probs, held, self._source.temperature)
        return Rejection(log_probs, held, self._config.seed, begun.sequence_id_B, self._config.block + 1, self._teacher.vocab_size)

    def _drafted(self, begun: Begun, system: System) -> Written:
        rule: Rule = self._rule(begun, self._config.block + 1 + (system.drafter.span if system.noisy else 0), system.rule)
        return speculate(self._teacher, system.drafter, rule, begun.given_BP, begun.given_B, begun.limit_B, self._config.block)

    def _plain(self, begun: Begun) -> Tensor:
        """The teacher alone, in the loop that writes datasets."""
        chosen, length = _Chosen(self._rule(begun, 1)), int(begun.limit_B.max())
        given_BP = begun.given_BP[:, :length]
        ids_BL = write(self._teacher, chosen, 0, begun.sequence_id_B, given_BP, begun.given_B, length)[0].to(self._teacher.device)
        out_BL = torch.zeros(len(ids_BL), self._source.length, dtype=torch.int64, device=ids_BL.device)
        out_BL[:, :length] = ids_BL.where(torch.arange(length, device=ids_BL.device) < begun.limit_B[:, None], 0)
        return out_BL

    def _columns(self, begun: Begun, system: System, plain_BL: Tensor, written: Written) -> dict[str, Tensor]:
        wide = self._source.length - written.ids_BL.shape[1]
        head_BL, stands_BL, ids_BL = (torch.nn.functional.pad(part, (0, wide)) for part in (written.head_BL, written.stands_BL, written.ids_BL))
        columns = {"calls": written.calls_B, "drafter_calls": written.drafter_calls_B, "head": head_BL.short(), "stands": stands_BL.short()}
        columns["offered"] = written.offered_BK
        if system.rule == SHARED:
            columns |= self._first_difference(begun, plain_BL, ids_BL)
        return columns

    def _first_difference(self, begun: Begun, plain_BL: Tensor, ids_BL: Tensor) -> dict[str, Tensor]:
        """Where each row leaves plain sampling's (0: nowhere), and how far apart log p + g is there for the two tokens, by one whole forward."""
        differs_BL = plain_BL != ids_BL
        row_N = differs_BL.any(1).nonzero()[:, 0]
        at_B, gap_B = differs_BL.int().argmax(1), torch.zeros(len(plain_BL), dtype=torch.float64, device=plain_BL.device)
        if len(row_N):
            position_N, short = at_B[row_N], Held(begun.noise, len(plain_BL), 1, self._teacher.vocab_size, self._teacher.device)
            logits_NV = self._teacher.logits_of(plain_BL, row_N * plain_BL.shape[1] + position_N)
            scores_NV = SharedNoise(self._source.log_probs(), short).scores(logits_NV, row_N, position_N)[0]
            both_N2 = scores_NV.gather(1, torch.stack((plain_BL[row_N, position_N], ids_BL[row_N, position_N]), 1))
            gap_B[row_N] = both_N2.diff(dim=1)[:, 0].abs().double()
        return {"differs_at": at_B, "gap": gap_B}


@dataclass(frozen=True)
class _Chosen:
    """A rule of `pipeline.generate.write`, with noise from anywhere: all rows are written together, so their order names them."""

    rule: SharedNoise
    stop: None = None

    def scores(self, logits_NV: Tensor, rows_N5: Tensor) -> tuple[Tensor, Tensor]:
        position_N = rows_N5[:, 2] & (philox.MAX_POSITION - 1)
        return self.rule.scores(logits_NV, torch.arange(len(rows_N5), device=rows_N5.device), position_N)


def _about(name: str) -> dict[str, Any] | None:
    """What a student's folder says of it; None for a causal LM."""
    path = Path(name) / "student.json"
    about = read_json(path) if path.exists() else None
    return about if about and about.get("kind") != "ar" else None


def _load(name: str, teacher: CausalLM, device: str) -> Any:
    """A student, or a causal LM. Raises DatasetError, by field, where its vocabulary is not the teacher's."""
    about = _about(name)
    student: Any = load_student(Path(name), device) if about else CausalLM(name, device)
    ours: dict[str, Any] = {"vocab_size": student.vocab_size}
    theirs: dict[str, Any] = {"vocab_size": teacher.vocab_size}
    tokenizer = (((about or {}).get("provenance") or {}).get("identity") or {}).get("tokenizer")
    folder = Path(teacher.name) if Path(teacher.name).is_dir() else locate(TeacherConfig(model=teacher.name))[0]
    if tokenizer and (folder / "tokenizer.json").exists():
        ours["tokenizer.sha256"], theirs["tokenizer.sha256"] = tokenizer["sha256"], tokenizer_hash(folder)
    if changed := differences(ours, theirs):
        raise DatasetError(
            f"{name} has another vocabulary than the teacher {teacher.name}: {'; '.join(changed)}; give a student of this teacher's tokens"
        )
    return student


def _systems(config: AcceptConfig, students: dict[str, Any]) -> list[System]:
    """Every student under the rules that suit it."""
    kinds = {name: "ar" if isinstance(student, CausalLM) else student.config.kind for name, student in students.items()}
    for setting, default, takers in (("nfe", 1, ("mdlm", "bd3lm")), ("sight", 0, ("mdlm",))):
        if getattr(config, setting) != default and not set(kinds.values()) & set(takers):
            raise ValueError(f"{setting} is {getattr(config, setting)}, which only students of kind {' and '.join(takers)} read; drop it")
    folder = Path(config.teacher) if Path(config.teacher).is_dir() else locate(TeacherConfig(model=config.teacher))[0]
    systems = []
    for name, student in students.items():
        if isinstance(student, CausalLM):
            drafter: Drafter = CausalDrafter(student)
        else:
            drafter = drafter_of(student, config.nfe, config.sight, weights_hash(folder) if kinds[name] == "medusa" else "")
        noise = "none" if isinstance(student, CausalLM) else student.noise.kind
        rules = [SHARED] + ([REJECTION] if noise in ("none", "independent") and not config.rows else [])
        systems += [System(Path(name).name, rule, drafter, noise != "none") for rule in rules]
    return systems
