"""Every setting of an evaluation. The docstring under a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eval.decoding import OrderName, SamplerName


@dataclass
class System:
    """One student of a report, traced by one of: temperatures, noise temperatures, nuclei."""

    student: str
    """Folder of a trained mdlm, bd3lm, mtp, medusa or ar student."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Divide the logits before sampling; more than one traces the frontier."""
    noise_temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Multiply the noise given to the student; more than one traces the frontier."""
    nucleus: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    output: Literal["auto", "sample", "argmax"] = "auto"
    """auto: argmax where noise.readout made it the sample, else sample."""
    nuclei: list[float] = field(default_factory=list)
    """Several values in place of nucleus: they trace the frontier."""
    top_k: int = 0
    """Sample from that many most likely tokens; 0: from all."""
    sampler: SamplerName = "even"
    """As in `eval sample`. first_hitting and adaptive take as many forwards as they take, and are shown at that number."""
    order: OrderName = "random"
    """As in `eval sample`."""
    fresh_noise: bool = False
    """Draw the student's noise anew in each step, in place of holding it through all."""
    auxiliary: str = ""
    """The small causal LM of adaptive, in the student's tokens: a folder or hub id."""
    student_weight: float = 0.5
    """R of adaptive: its target is p_student^R p_auxiliary^(1-R)."""
    lookahead: int = 0
    """M of adaptive, as in `eval sample`."""
    recompute: int = 0
    """W of adaptive, as in `eval sample`."""
    nfe: list[int] = field(default_factory=list)
    """Function evaluations of this system; empty: the report's. An mtp student needs as many as write its rows. An ar student makes one forward a
    token, a medusa student those that it takes: it drafts for its backbone, whose text it writes."""

    @property
    def swept(self) -> list[str]:
        """Which field traces the frontier; none: the system is one point."""
        return [name for name in ("temperatures", "noise_temperatures", "nuclei") if len(getattr(self, name)) > 1]

    def __post_init__(self) -> None:
        for name in ("temperatures", "noise_temperatures", "nuclei", "nfe"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (not values and name.endswith("temperatures")):
                raise ValueError(f"{name} of {self.student} is {values}; give at least one value, each once")
        if len(self.swept) > 1:
            raise ValueError(f"{self.student} has several {' and several '.join(self.swept)}; a frontier is traced by one of them")
        if self.nuclei and self.nucleus != 1:
            raise ValueError(f"{self.student} has nucleus {self.nucleus} and nuclei {self.nuclei}; nuclei stand in its place: drop nucleus")
        if bool(self.auxiliary) != (self.sampler == "adaptive"):
            raise ValueError(
                f"{self.student} has sampler {self.sampler} and auxiliary {self.auxiliary!r}; adaptive needs a small causal LM, the others take none"
            )


@dataclass
class MauveConfig:
    """How near samples are to real text in the features of a language model; see eval/mauve.py."""

    featuriser: str = ""
    """Any Hugging Face language model, a folder or hub id (the paper of MAUVE: gpt2-large). Empty: no MAUVE."""
    pooling: Literal["last", "mean"] = "last"
    """Feature of a text: the last hidden state of its last token, or the mean over its tokens (for models that read both ways)."""
    clusters: int = 0
    """Clusters of all features; 0: one for ten texts."""
    variance: float = 0.9
    """Share of the features' variance that is kept."""
    scale: float = 5.0
    """c of the frontier."""
    seed: int = 1
    """Names the clusters."""
    implementation: Literal["own", "mauve-text"] = "own"
    """mauve-text: the authors' package, GPL-3.0, where it is installed."""

    def __post_init__(self) -> None:
        if self.clusters < 0 or self.clusters == 1 or not 0 < self.variance <= 1 or self.scale <= 0:
            raise ValueError(
                f"mauve has clusters {self.clusters}, variance {self.variance} and scale {self.scale}; "
                "give 2 clusters or more (0: one for ten texts), a variance in (0, 1] and a scale above 0"
            )


@dataclass
class ReportConfig:
    """Students compared at matched entropy, with everything that the comparison needs."""

    output: str
    """Folder of report.html, report.md, report.json and report.png; finished pieces are kept in folders beside them."""
    judge: str
    """Causal LM that scores the samples, a folder or hub id; not the teacher that made the noise."""
    heldout: str = ""
    """Dataset of held-out rows at the students' block length: real text, and the noise that is to be turned back into it."""
    datasets: list[str] = field(default_factory=list)
    """Several of them in place of heldout: a report of each, in a folder of its name, of the students that fit its rows, and a page of all."""
    systems: dict[str, System] = field(default_factory=dict)
    """Name in the report -> student and how it is traced."""
    students: str = ""
    """Folder of students: those that are not among the systems are added, with the traces that suit them. Empty: the systems alone."""
    baseline: str = ""
    """The system that all others are compared with; empty: the first masked student without noise, or else the first. One that takes its own number
    of forwards (first_hitting, adaptive, medusa) is compared with such a one: the baseline, or the baseline's student under the same sampler."""
    teacher: str = ""
    """Causal LM that made the noise: its own samples, as they are and at the entropy of real text, are a reference line. Empty: left out."""
    control: str = ""
    """The system with noise that knows nothing of the text; systems with noise are compared with it too. Empty: none."""
    tokenizer: str = ""
    """Folder of the students' tokenizer; empty: tokenizer/ in the held-out dataset."""
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Function evaluations: forwards of the student for one sequence."""
    refine: int = 1
    """Further points of each traced system, each placed where those before it say that the entropy of real text lies; 0: none."""
    sequences: int = 1024
    """Sequences behind every figure."""
    mauve: MauveConfig = field(default_factory=MauveConfig)
    """MAUVE against real text."""
    timing_rows: int = 64
    """Sequences of the batch whose wall time is measured, each system at each NFE; 0: no wall time."""
    reconstruction_rows: int = 512
    """Held-out rows that are reconstructed from their noise; 0: none."""
    reconstruction_order: Literal["random", "confidence"] = "random"
    """Which positions are revealed first in reconstruction."""
    shown: int = 3
    """Sequences shown side by side."""
    shown_nfe: int = 4
    """Their function evaluations; where it is not in nfe, the nearest that is."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval."""
    seed: int = 1
    """Names the samples: noise, order and choices at the output, and the bootstrap."""
    batch: int = 256
    """Sequences sampled together; changes speed and memory, not the text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if bool(self.heldout) == bool(self.datasets):
            raise ValueError(f"heldout is {self.heldout!r} and datasets {self.datasets}; give one held-out dataset, or several as datasets")
        if not self.systems and not self.students:
            raise ValueError("systems is empty and students too; name the systems, or a folder of students")
        for name in [self.baseline, self.control]:
            if name and name not in self.systems and not self.students:
                raise ValueError(f"baseline or control is {name!r}, which is not among the systems: {', '.join(self.systems)}")
        if self.control and self.control == self.baseline:
            raise ValueError(f"baseline and control are both {self.baseline!r}; the control is the system with independent noise")
        if not self.nfe or min(self.nfe) < 1 or len(set(self.nfe)) < len(self.nfe):
            raise ValueError(f"nfe is {self.nfe}; give numbers from 1 up, each once")
        leasts = {"sequences": 2, "replicates": 20, "batch": 1, "reconstruction_rows": 0, "shown": 0, "timing_rows": 0, "refine": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass
class SampleConfig:
    """Samples of one student."""

    student: str
    """Folder of a trained mdlm, bd3lm, mtp, medusa or ar student, or a causal LM: a folder or hub id."""
    output: str
    """Folder where the sample set is kept, and found again by the same command."""
    bos: int = -1
    """Token at position 0; -1: BOS of the tokenizer, or EOS where it has none."""
    tokenizer: str = ""
    """Folder of the student's tokenizer; empty: tokenizer/ in the dataset it was trained on, or a causal LM's own."""
    sampler: SamplerName = "even"
    """How many positions a forward of a masked student reveals. even: equal groups in nfe forwards. ancestral: MDLM's reverse process in nfe
    steps of the log-linear schedule; a step that reveals nothing costs no forward. first_hitting: the same process at its exact times, one
    token a forward. adaptive: from left to right, as many as a small causal LM agrees with (arXiv 2506.00413)."""
    nfe: int = 0
    """Function evaluations, forwards of the student for one sequence: 1 to the unknown positions with even, steps with ancestral (0: 8);
    first_hitting and adaptive take what they take. bd3lm: of one block (0: its positions). mtp: each writes at most the tokens that it predicts (0:
    as few as do). The forwards really made are counted and printed."""
    order: OrderName = "random"
    """Which positions even and ancestral reveal first. confidence: the surest of the moment. An mtp student writes from left to right."""
    auxiliary: str = ""
    """The small causal LM of adaptive, in the student's tokens: a folder or hub id."""
    student_weight: float = 0.5
    """R of adaptive: its target is p_student^R p_auxiliary^(1-R). At 1 all tokens are taken at once; lower, fewer are."""
    lookahead: int = 0
    """M of adaptive: masked positions that the student is shown in a call; 0: all. The row is cut before the next one, so a forward is shorter
    and takes at most M tokens; a student trained on full rows has not seen rows that end there."""
    recompute: int = 0
    """W of adaptive: a call reads a row from W - 1 positions before the tokens that it last wrote, 1: those alone; keys and values of what stands
    before are kept from earlier calls, which is approximate, since they have not seen what was written since. 0: read all, exactly."""
    drafter: str = ""
    """For a causal LM: a student that drafts (mdlm, bd3lm, mtp or medusa), or a smaller causal LM. The text is the one that the LM writes alone from
    the same seed, in fewer of its calls, and no longer than the drafter reads. nfe is then the forwards of a draft (of bd3lm, of a block), 0: one. A
    drafter with noise holds it for batch x the positions it sees x V: small batches."""
    block: int = 4
    """For a drafter: tokens of a draft, at most."""
    packed: bool = False
    """For a causal LM on CPUs, in float32: lay its weights out once for oneDNN. Forwards are faster then, and drafts cheap to judge."""
    prompts: str = ""
    """JSONL of prompts or texts with blanks; sequence i takes line i modulo their number. Perplexity counts given tokens too. Empty: BOS alone."""
    given_teacher: str = ""
    """The teacher, for a student that reads the noise of known tokens (noise.known): prompts then carry the posterior noise that makes it choose
    them, up to a row's first blank, as the teacher reads from left to right. Empty: given tokens carry no noise. With a drafter it is the causal LM
    itself, which reads the prompt once more for it."""
    length: int = 0
    """Positions of a row, BOS included; 0: the student's block, or a causal LM's context, or its drafter's. A bd3lm student writes longer too,
    always in blocks of the size that it was trained with."""
    eos: int = -1
    """bd3lm: a row ends at this token, once it is written past all that is given; -1: rows have their full length."""
    keep_blocks: int = 0
    """bd3lm: blocks that stay in sight when the window slides past the training length; 0: half a window."""
    sequences: int = 0
    """How many; 0: 1024, or one for each prompt."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    noise_temperature: float = 1.0
    """Multiplies the noise given to the student."""
    fresh_noise: bool = False
    """Draw the noise given to the student anew in each step; without, it is held through all steps, as it was in training."""
    nucleus: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""
    top_k: int = 0
    """Sample from that many most likely tokens; 0: from all."""
    choose: Literal["auto", "sample", "argmax"] = "auto"
    """auto: argmax where noise.readout made it the sample, else sample."""
    seed: int = 1
    """Names the samples."""
    batch: int = 256
    """Sequences sampled together; changes speed and memory, not the text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    shown: int = 4
    """Sequences printed."""

    def __post_init__(self) -> None:
        if self.sequences < 0 or self.batch < 1:
            raise ValueError(f"sequences is {self.sequences} and batch {self.batch}; give at least 1 (sequences 0: 1024, or one for each prompt)")
        for name, least in (("nfe", 0), ("block", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("eos", "bos"):
            if getattr(self, name) < -1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a token, or -1, which is the default")


@dataclass
class PerplexityConfig(SampleConfig):
    """Generative perplexity, entropy and distinct-n of one student's samples."""

    judge: str = ""
    """Causal LM that scores the samples, a folder or hub id."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval."""


@dataclass
class ReconstructConfig:
    """Token accuracy of one student when all tokens are masked and the posterior noise of held-out rows is given."""

    student: str
    """Folder of a trained mdlm, bd3lm or mtp student."""
    heldout: str
    """Dataset of held-out rows with noise."""
    nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Function evaluations."""
    rows: int = 512
    """How many held-out rows."""
    order: Literal["random", "confidence"] = "random"
    """Which positions are revealed first."""
    seed: int = 1
    """Names the random order."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if not self.nfe or min(self.nfe) < 1:
            raise ValueError(f"nfe is {self.nfe}; give at least one number, each from 1 up")


@dataclass
class AcceptConfig:
    """Accepted tokens per teacher call of one or several drafters."""

    student: str | list[str]
    """Folder of a trained mdlm, bd3lm, mtp or medusa student, or a small causal LM; or a list of them."""
    teacher: str
    """The causal LM whose samples are wanted, a folder or hub id."""
    output: str
    """Folder of accept.json; finished batches are kept in its accept/."""
    rows: str = ""
    """Noise dataset: its rows are written from their own noise. Empty: samples."""
    prompts: str = ""
    """JSONL of prompts; sequence i takes line i modulo their number. Empty: BOS alone."""
    given_noise: bool = False
    """Give students that read the noise of known tokens (noise.known) the posterior noise of their prompt's, under the teacher, which must be the one
    of their dataset. That takes a call of it before the first draft, which is counted."""
    bos: int = -1
    """Token at position 0 of a sample; -1: BOS of the tokenizer, or EOS where it has none."""
    tokenizer: str = ""
    """Folder of the tokenizer; empty: the teacher's own."""
    length: int = 0
    """Positions of a sample, BOS included; 0: the shortest of the students' blocks and the teacher's context."""
    block: int = 4
    """Tokens of a draft at most; a medusa or mtp student drafts as many as it predicts."""
    nfe: int = 1
    """Forwards of an mdlm student for a draft, of a bd3lm student for each block."""
    sight: int = 0
    """Masks after the known tokens that an mdlm student sees, at least `block`; 0: all to the row's end, as in training."""
    sequences: int = 0
    """How many; 0: 64, or one for each prompt."""
    batch: int = 1
    """Sequences written together, each at its own pace; changes the time, not the text."""
    temperature: float = 1.0
    """Divides the teacher's logits."""
    nucleus: float = 1.0
    """Sample from the smallest set of the teacher's tokens with at least this probability."""
    top_k: int = 0
    """Sample from that many of the teacher's most likely tokens; 0: from all."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """In which the teacher computes."""
    packed: bool = False
    """On CPUs, in float32: lay the teacher's weights out once for oneDNN. A forward over a draft then costs hardly more than one over a token."""
    seed: int = 1
    """Names the noise and the choices."""
    replicates: int = 1000
    """Bootstrap replicates behind every interval."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if not self.students or len(set(self.students)) < len(self.students):
            raise ValueError(f"student is {self.students}; give at least one, each once")
        for name, least in (("block", 1), ("nfe", 1), ("sequences", 0), ("batch", 1), ("replicates", 20), ("sight", 0), ("length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if 0 < self.sight < self.block:
            raise ValueError(f"sight is {self.sight}, less than the {self.block} tokens of a draft; raise it, or give 0")
        if self.given_noise and not self.prompts:
            raise ValueError("given_noise is set, but nothing is given: prompts is empty; give prompts, or drop it")
        usual = {"prompts": "", "bos": -1, "tokenizer": "", "length": 0, "temperature": 1.0, "nucleus": 1.0, "top_k": 0}
        for name, default in usual.items():
            if self.rows and getattr(self, name) != default:
                raise ValueError(f"{name} is {getattr(self, name)}, but the dataset {self.rows} says how its rows begin, end and are chosen; drop it")

    @property
    def students(self) -> list[str]:
        return [self.student] if isinstance(self.student, str) else list(self.student)
