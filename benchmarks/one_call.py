"""What limits noise to text in one call? Students of a teacher that is known exactly, each unlike one base student in one thing.

    python -m benchmarks.one_call
    python -m benchmarks.one_call --students '[base, 8 layers]' --seeds '[1]' --steps 2000

The teacher is a Markov chain (eval.markov). Given the noise its text is a function of it, and in one call with everything masked a student has
to compute that function. Each student is trained by the trainer itself on texts of the chain, and then asked, in one call:

"match": how many tokens are the teacher's own from the same fresh noise; "prefix": how many before the first that is not; "follows": how many are
what the teacher would write after the student's own token before them, which is one step of the function done right.

"posterior": how many tokens of held-out rows come back from the noise that the sketch keeps of them. It is match, up to the sketch and to chance, if
noise that is drawn backwards from text is as good as noise that text is written from.

"valid": the share of adjacent pairs that the chain allows, at 1, 2 and 4 calls.

"windows": match where a position sees its own noise and that of so many positions before it, and fresh noise elsewhere, beside an ideal reader of the
same (benchmarks.reach); "reach" is how many an ideal reader would need to match as often as the student does.

Students and figures are kept under --folder: interrupted at any moment, the same command continues, and other --students or --seeds make only what is
missing. About seven minutes of processor time a seed, by estimate. The table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import one_call_table, results
from benchmarks.reach import equivalent, ideal, maps, shown, windows
from eval.causal import folder_identity
from eval.decoding import Decoding
from eval.exact import BOS, write_dataset
from eval.markov import MarkovTeacher
from eval.reconstruct import reconstruct
from eval.sampler import blank_rows, resolve_output, sample, sampling_noise
from noise.storage import read_json, write_json
from trainer.config import DataConfig, NoiseConfig, OptimConfig, StudentConfig, TrainConfig
from trainer.data import NoiseDataset
from trainer.flops import forward
from trainer.loop import train
from trainer.students import load_student, parameters

Figures = dict[str, Any]
NFE = (1, 2, 4)
BEFORE = [0, 1, 2, 4]
EPSILON = 0.125


@dataclass
class Config:
    """The chain, the base student, and which students."""

    students: list[str] = field(default_factory=list)
    """Which of the students; empty: all."""
    seeds: list[int] = field(default_factory=lambda: [1, 2])
    """Each names texts, initial weights, order, masks and samples of one run of everything."""
    states: int = 16
    """States of the chain."""
    successors: int = 4
    """Possible successors of each state."""
    length: int = 8
    """Tokens of a row after BOS."""
    rows: int = 32768
    """Training rows."""
    layers: int = 4
    """Layers of the base student; others have half and twice as many."""
    hidden: int = 64
    """Width of the base student; others have half and twice of it."""
    heads: int = 4
    """Attention heads."""
    steps: int = 450
    """Optimizer steps of the base student; one has twice as many."""
    global_batch: int = 64
    """Rows a step."""
    lr: float = 7e-3
    """Peak learning rate, the same for all."""
    sequences: int = 2048
    """Rows of match, prefix and posterior, fresh ones and held-out ones."""
    few_rows: int = 256
    """Rows of valid and the windows, which need many calls."""
    folder: str = "runs/one_call"
    """Where students, datasets and finished figures are kept."""
    output: str = "benchmarks/results/one_call.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.students if name not in students(self)]
        if unknown:
            raise ValueError(f"students names {unknown}; give some of {', '.join(students(self))}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give at least one, each once")
        for name, least in (("length", max(*NFE, max(BEFORE))), ("layers", 4), ("sequences", 2), ("rows", 1), ("few_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.few_rows > self.sequences:
            raise ValueError(f"few_rows is {self.few_rows}, of sequences {self.sequences}; lower it")

    @property
    def chain(self) -> MarkovTeacher:
        return MarkovTeacher(self.states, self.successors)


@dataclass(frozen=True)
class Student:
    """One student of the study."""

    factor: str
    """In what it is unlike the base."""
    model: StudentConfig
    steps: int
    epsilon: float = EPSILON
    """Of the sketch that its noise comes from."""


def students(config: Config) -> dict[str, Student]:
    """Name -> student; the first one is the base. Drafts stand after every layer but the last where nothing else is said."""
    base = StudentConfig(layers=config.layers, hidden=config.hidden, heads=config.heads, noise=drafted(range(1, config.layers)))
    half, twice, plain = config.layers // 2, 2 * config.layers, drafted(())
    sparse = drafted(range(2, twice, 2))

    def deep(layers: int, noise: NoiseConfig | None = None) -> StudentConfig:
        return replace(base, layers=layers, noise=noise or drafted(range(1, layers)))

    def clipped(low: float) -> StudentConfig:  # block diffusion's option; one block over the row is masked diffusion
        return replace(base, kind="bd3lm", block_size=config.length + 1, clip=(low, 1.0))

    models = {
        "base": ("", base),
        f"hidden {config.hidden // 2}": ("capacity", replace(base, hidden=config.hidden // 2)),
        f"hidden {config.hidden * 2}": ("capacity", replace(base, hidden=config.hidden * 2)),
        f"{half} layers": ("depth", deep(half)),
        f"{twice} layers": ("depth", deep(twice)),
        f"{twice} layers, {len(sparse.drafts)} drafts": ("depth", deep(twice, sparse)),
        f"{config.layers} layers, 1 draft": ("depth", deep(config.layers, drafted([half]))),
        f"{half} layers, no drafts": ("depth", deep(half, plain)),
        f"{config.layers} layers, no drafts": ("depth", deep(config.layers, plain)),
        f"{twice} layers, no drafts": ("depth", deep(twice, plain)),
        "no readout": ("information", replace(base, noise=replace(base.noise, readout=False))),
        "input alone (paper)": ("information", replace(base, noise=replace(plain, readout=False))),
        "independent noise": ("information", replace(base, noise=replace(base.noise, kind="independent"))),
        "mask rates 1/2 to 1": ("training", clipped(0.5)),
        "all masked always": ("training", clipped(1.0)),
    }  # fmt: skip
    found = {name: Student(factor, model, config.steps) for name, (factor, model) in models.items()}
    found["epsilon 1/1024"] = Student("information", base, config.steps, 2.0**-10)
    found["epsilon 1/2"] = Student("information", base, config.steps, 0.5)
    found["twice the steps"] = Student("training", base, 2 * config.steps)
    return found


def drafted(layers: Any) -> NoiseConfig:
    """Gumbel noise at the input and at the output, and drafts after these layers."""
    drafts = list(layers)
    noise = NoiseConfig(kind="gumbel", input="replace", readout=True)
    return replace(noise, drafts=drafts, draft_restart=True, draft_weight=1.0) if drafts else noise


@dataclass(frozen=True)
class Run:
    """One student of one seed: its datasets, its training, its figures."""

    config: Config
    name: str
    student: Student
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.config.folder) / f"seed{self.seed}" / self.name.replace(" ", "-").replace("/", "-of-")

    def dataset(self, rows: int, text_seed: int) -> Path:
        """A dataset of the chain's texts, made once for all students of this seed and epsilon."""
        config, epsilon = self.config, self.student.epsilon
        path = Path(config.folder) / "datasets" / f"texts{text_seed}-{rows}-{epsilon:g}"
        write_dataset(path, config.chain, rows, config.length + 1, text_seed, epsilon=epsilon)
        return path

    def figures(self) -> Figures:
        """Train and measure, or find it done."""
        config, steps = self.config, self.student.steps
        heldout = self.dataset(config.sequences, 2 * self.seed + 1)
        training = TrainConfig(
            output=str(self.folder), data=DataConfig(path=str(self.dataset(config.rows, 2 * self.seed))), student=self.student.model,
            optim=OptimConfig(steps=steps, global_batch=config.global_batch, lr=config.lr, warmup=steps // 10, schedule="linear", ema=0.99),
            seed=self.seed, device="cpu", threads=1, log_every=steps, eval_every=0, checkpoint_every=max(1, steps // 4),
            keep_checkpoints=1, tensorboard=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):  # the table alone is for stdout
            train(training)
        asked = {"student": folder_identity(self.folder), "sequences": config.sequences, "few_rows": config.few_rows}
        kept = self.folder / "figures.json"
        if kept.exists() and read_json(kept)["asked"] == asked:
            found: Figures = read_json(kept)["figures"]
            return found
        model: Any = load_student(self.folder)
        returned_S = reconstruct(model, NoiseDataset(heldout), config.sequences, 1, "random", self.seed)
        flops = forward(model.config, model.vocab_size, model.block_length, config.length)
        found = {"parameters": parameters(model), "flops": flops, **measured(config, model, self.seed), "posterior": mean(returned_S)}
        write_json(kept, {"asked": asked, "figures": found})
        print(f"one_call: seed {self.seed}, {self.name}: match {found['match']['mean']:.3f}", file=sys.stderr, flush=True)
        return found


@torch.inference_mode()
def measured(config: Config, model: Any, seed: int) -> Figures:
    """Everything that is asked of a student with fresh noise."""
    chain, sequence_id_S = config.chain, torch.arange(config.sequences)
    ids_SL = blank_rows(model, config.sequences, config.length + 1, BOS)
    own_SL = chain.rollout(sequence_id_S, config.length + 1, seed)[:, 1:]
    g_NV = sampling_noise(seed, sequence_id_S, ids_SL == model.mask_id, chain.vocab_size)
    told_SL = model.logits(ids_SL, g_NV).argmax(-1).view_as(own_SL)
    same_SL = (told_SL == own_SL).double()
    chosen_SL = (chain.log_p[torch.cat((ids_SL[:, :1], told_SL[:, :-1]), 1)] + g_NV.view(*own_SL.shape, -1)).argmax(-1)
    few = slice(0, config.few_rows)
    g_SLV = g_NV.view(*own_SL.shape, -1)[few]
    other_SLV = sampling_noise(seed + 2**32, sequence_id_S[few], ids_SL[few] == model.mask_id, chain.vocab_size).view_as(g_SLV)
    return {
        "match": mean(same_SL.mean(1).numpy()),
        "by_position": same_SL.mean(0).tolist(),
        "prefix": mean(same_SL.cumprod(1).sum(1).numpy()),
        "follows": mean((told_SL == chosen_SL).double().mean(1).numpy()),
        "valid": {str(nfe): valid(config, model, seed, nfe) for nfe in NFE},
        "windows": [
            {"shown": name, "match": float((shown(model, g_SLV, other_SLV, seen_LL) == own_SL[few]).double().mean())}
            for name, seen_LL in windows(config.length, BEFORE).items()
        ],
    }


def valid(config: Config, model: Any, seed: int, nfe: int) -> float:
    """Share of adjacent pairs that the chain allows, of rows drawn in this many calls."""
    ids_SL = blank_rows(model, config.few_rows, config.length + 1, BOS)
    output = "sample" if model.noise.kind == "independent" else resolve_output("auto", model)  # noise that says nothing cannot be the sample
    drawn_SL = sample(model, ids_SL, torch.arange(config.few_rows), seed, Decoding(nfe, output=output))
    return float((config.chain.transition[drawn_SL[:, 1:-1], drawn_SL[:, 2:]] > 0).double().mean())


def mean(value_S: Any) -> dict[str, float]:
    """Mean over rows and its standard error."""
    return {"mean": float(np.mean(value_S)), "error": float(np.std(value_S, ddof=1) / len(value_S) ** 0.5)}


def run(config: Config) -> Figures:
    """Every student of every seed; writes the JSON, returns its figures."""
    chosen = {name: student for name, student in students(config).items() if not config.students or name in config.students}
    found = {seed: {name: Run(config, name, student, seed).figures() for name, student in chosen.items()} for seed in config.seeds}
    map_SLK = maps(config.chain, noise_of(config))
    ideal_kL = [ideal(config.chain, map_SLK, before) for before in range(config.length)]
    ideal_k = [float(ideal_L.mean()) for ideal_L in ideal_kL]
    rows = []
    for name, student in chosen.items():
        by_seed = {str(seed): found[seed][name] for seed in config.seeds}
        reach = float(np.mean([equivalent(each["match"]["mean"], ideal_k) for each in by_seed.values()]))
        rows.append({"name": name, "factor": student.factor, "steps": student.steps, "epsilon": student.epsilon, "reach": reach, "seeds": by_seed})
    settings = {name: value for name, value in asdict(config).items() if name not in ("folder", "output")}
    figures = {"ideal": ideal_k, "ideal_by_position": [ideal_L.tolist() for ideal_L in ideal_kL], "students": rows}
    results.write(Path(config.output), settings, figures)
    return figures


def noise_of(config: Config) -> torch.Tensor:
    """The fresh noise of the first seed, float32 [S, L, V]: what the ideal reader's figures are taken over."""
    unknown_SL = torch.ones(config.sequences, config.length + 1, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
    g_NV = sampling_noise(config.seeds[0], torch.arange(config.sequences), unknown_SL, config.chain.vocab_size)
    return g_NV.view(config.sequences, config.length, -1)


def main(arguments: list[str] | None = None) -> int:
    def work(config: Config) -> None:
        print(one_call_table.markdown(run(config)))

    return results.command("one_call", __doc__ or "", Config, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
