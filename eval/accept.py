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

from eval import drafting, samples, tables
from eval.accept_figures import figures
from eval.accept_rows import Begun, Source, source_of
from eval.causal import CausalLM
from eval.config import AcceptConfig
from eval.given import GivenTeacher
from eval.metrics import Array, bootstrap_weights
from eval.progress import Progress
from eval.prompts import BLANK
from eval.referee import Held, Rejection, Rule, SharedNoise
from eval.speculative import Drafter, Written, speculate
from eval.study import device_of
from noise import philox
from noise.storage import write_json
from pipeline.generate import write
from pipeline.replay import tolerance

SHARED, REJECTION = "shared noise", "rejection"


@dataclass(frozen=True)
class System:
    """A drafter under a rule."""

    name: str
    rule: str
    drafter: Drafter
    given_teacher: GivenTeacher | None
    """gives it the posterior noise of prompts"""


def build(config: AcceptConfig) -> dict[str, Any]:
    """accept.json. Raises DatasetError or ValueError, before the first forward, for models and rows that do not fit together."""
    device = device_of(config.device)
    teacher = CausalLM(config.teacher, device, config.dtype, packed=config.packed)
    students = {name: drafting.load(name, teacher) for name in config.students}
    systems = _systems(config, teacher, students)
    longest = {name: drafting.longest(student) for name, student in students.items()}
    source = source_of(config, teacher, {**longest, teacher.name: teacher.max_length})
    sequences = config.sequences or (source.count if config.prompts else 64)
    if config.rows:
        sequences = min(sequences, source.count)
    request = {
        "format_version": samples.FORMAT_VERSION, "teacher": teacher.identity, "dtype": config.dtype, "rows": source.request,
        "students": [drafting.identity_of(name) for name in config.students],
        "block": config.block, "nfe": config.nfe, "sight": config.sight, "seed": str(config.seed), "sequences": sequences, "batch": config.batch,
        "device": device, **{name: True for name in ("packed", "given_noise") if getattr(config, name)},
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
    report["settings"] = {
        name: getattr(config, name)
        for name in ("teacher", "rows", "prompts", "given_noise", "block", "nfe", "sight", "dtype", "packed", "seed", "batch")
    }
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
        rule: Rule = self._rule(begun, self._config.block + 1 + system.drafter.span, system.rule)
        given = None
        if system.given_teacher:
            blank_BP = torch.arange(begun.given_BP.shape[1], device=begun.given_B.device) >= begun.given_B[:, None]
            given = system.given_teacher(begun.given_BP.masked_fill(blank_BP, BLANK), begun.sequence_id_B, self._config.seed)
        return speculate(self._teacher, system.drafter, rule, begun.given_BP, begun.given_B, begun.limit_B, self._config.block, given)

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


def _systems(config: AcceptConfig, teacher: CausalLM, students: dict[str, Any]) -> list[System]:
    """Every student under the rules that suit it."""
    kinds = {name: "ar" if isinstance(student, CausalLM) else student.config.kind for name, student in students.items()}
    for setting, default, takers in (("nfe", 1, ("mdlm", "bd3lm")), ("sight", 0, ("mdlm",))):
        if getattr(config, setting) != default and not set(kinds.values()) & set(takers):
            raise ValueError(f"{setting} is {getattr(config, setting)}, which only students of kind {' and '.join(takers)} read; drop it")
    systems = []
    told = {
        name: GivenTeacher(config.teacher, student, str(teacher.device), teacher, f"given_noise is set for {name}, and teacher")
        for name, student in students.items()
        if config.given_noise and kinds[name] != "ar" and student.noise.known and student.noise.informed
    }
    if config.given_noise and not told:
        raise ValueError(
            "given_noise is set, but no student reads the posterior noise of known tokens (noise.known, and a noise.kind of the text); drop it"
        )
    for name, student in students.items():
        drafter = drafting.drafter_for(student, teacher, config.nfe, config.sight)
        noise = "none" if isinstance(student, CausalLM) else student.noise.kind
        rules = [SHARED] + ([REJECTION] if noise in ("none", "independent") and not config.rows else [])
        systems += [System(Path(name).name, rule, drafter, told.get(name)) for rule in rules]
    return systems
