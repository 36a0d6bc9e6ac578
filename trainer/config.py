"""Every setting of a training run. The docstring under a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class NoiseConfig:
    """How a student sees the teacher's noise."""

    kind: Literal["none", "gumbel", "independent"] = "none"
    """gumbel: the posterior noise of the dataset. independent: fresh noise that knows nothing of the text, the control. none: no noise."""
    input: Literal["none", "replace", "add"] = "none"
    """Whether softmax(g) through a V x H projection replaces the mask embedding, or is added to it."""
    projection: Literal["own", "tied"] = "own"
    """Weights of that projection: its own (the paper, V x H more parameters) or the token embedding's."""
    prior: Literal["none", "unigram"] = "none"
    """unigram: add the corpus's log unigram to g before that softmax, so that likely tokens stand out."""
    readout: bool = False
    """Add a learned scale times g to the output logits, so that argmax is the sample."""
    drafts: list[int] = field(default_factory=list)
    """After each of these layers (1 = after the first), re-embed softmax(logits + scale g) at the masked positions."""
    draft_restart: bool = False
    """A draft starts the stream again: the known tokens' embeddings, the draft's at the masked positions, and a learned share of what was there."""
    stream: bool = False
    """Make the noise again wherever a readout or draft reads it, chunk by chunk, in training: less memory, more time. The input does so always."""
    draft_weight: float = 0.1
    """Weight of each draft's own cross-entropy in the loss."""


@dataclass
class StudentConfig:
    """What is trained."""

    kind: Literal["ar", "mdlm"] = "mdlm"
    """ar: autoregressive (teachers, judges, baselines). mdlm: masked diffusion."""
    layers: int = 6
    """Transformer layers."""
    hidden: int = 128
    """Width H; a multiple of 2 x heads."""
    heads: int = 4
    """Attention heads."""
    mlp: int = 0
    """Width of the MLP; 0 means 8/3 of the hidden width, rounded up to a multiple of 32."""
    dropout: float = 0.0
    """Dropout on the residual branches."""
    shift: bool = False
    """mdlm: predict token t at position t - 1, as the causal model does whose weights it starts from."""
    init_from: str = ""
    """Folder of a Llama-family checkpoint (model.safetensors) or of a student to start from; what was not loaded is printed."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)


@dataclass
class DataConfig:
    """What is read."""

    path: str = ""
    """Folder of a finished noise dataset."""
    heldout: str = ""
    """Folder of a held-out dataset for the printed evaluation; empty: none."""
    check_hashes: bool = True
    """Check each shard's sha256 against its receipt when it is first opened."""
    open_shards: int = 64
    """How many shards are kept open at most."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    steps: int = 1000
    """Optimizer steps."""
    global_batch: int = 64
    """Rows a step over all processes: processes x micro_batch x accumulation."""
    micro_batch: int = 0
    """Rows a forward pass on one process; 0: the whole share of the process at once."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    warmup: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after warm-up: constant, or down to a tenth (cosine) or to zero (linear) at the last step."""
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    ema: float = 0.9999
    """Decay of the averaged weights that are saved as the student; step s uses s / (9 + s) where that is smaller. 0: none."""


@dataclass
class TrainConfig:
    """One training run; everything that a recipe may set."""

    output: str
    """Folder of the student: student.json, model.safetensors, recipe.yaml, metrics.jsonl, checkpoints/."""
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 1
    """Seed of initial weights, order, times, masks and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPUs, float32 on CPU."""
    threads: int = 0
    """CPU threads of all processes on a machine together; 0: one for each core."""
    compile: bool = False
    """torch.compile the backbone's layers."""
    log_every: int = 20
    """Steps between lines of metrics."""
    eval_every: int = 200
    """Steps between held-out evaluations with the noise probe; 0: only at the end."""
    eval_rows: int = 256
    """Held-out rows of each evaluation."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0: only at the end and on SIGTERM."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept; 0: all."""
    tensorboard: bool = True
    """Write TensorBoard events beside the JSONL where tensorboard is installed."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be in [0, 2^64)")
        for name, value, least in (
            ("log_every", self.log_every, 1), ("eval_every", self.eval_every, 0), ("eval_rows", self.eval_rows, 1),
            ("checkpoint_every", self.checkpoint_every, 0), ("keep_checkpoints", self.keep_checkpoints, 0), ("optim.steps", self.optim.steps, 1),
            ("optim.global_batch", self.optim.global_batch, 1), ("optim.micro_batch", self.optim.micro_batch, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
