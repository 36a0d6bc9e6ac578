"""Every setting of a training run. The docstring under a field is its help text."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Literal

PARTS = ("input", "projection", "prior", "readout", "drafts", "draft_restart")
"""Settings of the noise that say what reads it."""


@dataclass
class NoiseConfig:
    """How a student sees the teacher's noise."""

    kind: Literal["none", "gumbel", "gaussian", "uniform", "independent"] = "none"
    """gumbel: the posterior noise of the dataset. gaussian, uniform: the same noise through its distribution function, another marginal.
    independent: fresh Gumbel noise that knows nothing of the text, the control. none: no noise.
    A kind alone gives the student all parts, as docs/ablation.md found them best: input (mdlm: add, else replace), projection tied, prior
    unigram, readout, and a draft that restarts, after half the layers (medusa: a draft of every place but the last). Where input, readout or
    drafts is named, the student has the named ones alone: the recipes name theirs."""
    input: Literal["none", "replace", "add"] = "none"
    """Whether softmax(g) through a V x H projection replaces the mask embedding, or is added to it."""
    projection: Literal["own", "tied", "low_rank"] = "own"
    """Weights of that projection: its own (the paper, V x H more parameters), the token embedding's (none), or V x rank, rank x H."""
    rank: int = 0
    """Rank of projection low_rank; 0 with the others."""
    prior: Literal["none", "unigram"] = "none"
    """unigram: add the corpus's log unigram to g before that softmax, so that likely tokens stand out."""
    readout: bool = False
    """Add a learned scale times g to the output logits, so that argmax is the sample."""
    drafts: list[int] = field(default_factory=list)
    """After each of these layers (1 = after the first), re-embed softmax(logits + scale g) at the masked positions.
    medusa: of the tokens at these places (1 = what the backbone itself predicts, k + 1 = what head k does), for the heads further on."""
    draft_restart: bool = False
    """A draft starts the stream again: the known tokens' embeddings, the draft's at the masked positions, and a learned share of what was there."""
    known: bool = False
    """mdlm, bd3lm, mtp: known tokens carry noise too. In training all of them, that of the dataset; in sampling those that are written, the noise
    that wrote them, and those that are given none, or their posterior noise where the teacher is named."""
    stream: bool = False
    """Make the noise again wherever a readout or draft reads it, chunk by chunk, in training: less memory, more time. The input does so always."""
    draft_weight: float = 0.1
    """Weight of each draft's own cross-entropy in the loss."""

    @property
    def bare(self) -> bool:
        """Whether there is noise, and nothing says what reads it."""
        parts = NoiseConfig(self.kind, known=self.known, stream=self.stream, draft_weight=self.draft_weight)
        return self.kind != "none" and self == parts

    @property
    def informed(self) -> bool:
        """Whether the student sees the dataset's own noise, which knows the text."""
        return self.kind not in ("none", "independent")


@dataclass
class ObjectiveConfig:
    """What the student's logits are held against: the weights of the losses in their sum."""

    nelbo: float = 1.0
    """The student's own loss: cross-entropy to the text's tokens, weighted as its paper weighs it."""
    token_kd: float = 0.0
    """Cross-entropy to the teacher's distribution, estimated without bias from the kept entries (token-level distillation). Of text that the
    teacher wrote nothing is kept: refused alone; mixed with extracted text (data.mix) it is 0 on the written rows, in loss and figure."""


@dataclass
class MedusaConfig:
    """student.kind medusa: heads on a frozen causal LM."""

    backbone: str = ""
    """The causal LM, frozen: a Hugging Face folder or hub id."""
    revision: str = ""
    """The hub's revision; empty: its newest. Saved students name the commit."""
    weights_sha256: str = ""
    """Refuse a backbone whose weights have another hash; empty: take any. Saved students have it set."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which the backbone computes, whatever the heads' precision."""
    heads_count: int = 4
    """Heads: head k predicts the token k places after the one that the backbone itself predicts."""
    head_decay: float = 0.8
    """The loss of head k weighs this to the power k."""
    blocks: int = 1
    """Residual SiLU blocks of each head; the first one sees the noise."""
    lm_head: Literal["shared", "own"] = "shared"
    """Output layer of the heads: the backbone's, frozen, or a trained copy for each head."""


@dataclass
class StudentConfig:
    """What is trained."""

    kind: Literal["ar", "mdlm", "bd3lm", "medusa", "mtp"] = "mdlm"
    """ar: autoregressive (teachers, judges, baselines). mdlm: masked diffusion. bd3lm: block diffusion. medusa: heads on a frozen causal LM.
    mtp: some last tokens in one call."""
    backbone: Literal["llama", "dit"] = "llama"
    """llama: RMSNorm and SwiGLU, under Llama's names. dit: the network of the published MDLM and BD3-LM checkpoints, without time conditioning."""
    tied: bool = True
    """dit: the output layer is the token embedding. false: weights and a bias of its own, as published checkpoints have."""
    layers: int = 6
    """Transformer layers."""
    hidden: int = 128
    """Width H; a multiple of 2 x heads."""
    heads: int = 4
    """Attention heads."""
    mlp: int = 0
    """Width of the MLP; 0 means 8/3 of the hidden width, rounded up to a multiple of 32 (llama), or 4 times the hidden width (dit)."""
    dropout: float = 0.0
    """Dropout on the residual branches."""
    shift: bool = False
    """mdlm, bd3lm, mtp: predict token t at position t - 1, as the causal model does whose weights it starts from."""
    init_from: str = ""
    """What to start from: the folder of a student or of a Hugging Face model (causal or masked), its hub id, or a published MDLM or BD3-LM
    checkpoint (a folder, .safetensors or .ckpt). What was and was not loaded is printed."""
    block_size: int = 0
    """bd3lm: positions of a block, the first block's BOS among them; at most the dataset's block length."""
    clip: tuple[float, float] = (0.0, 1.0)
    """mdlm, bd3lm: training draws each row's, or block's, mask rate between these two; evaluation between 0 and 1 always, or 1 for blocks of one
    position. Rates near 0 are those of the last steps of many: students of few steps can do without them."""
    clip_search: bool = False
    """bd3lm: choose that interval anew at every held-out evaluation, by the least variance of the loss; clip holds until the first.
    A resumed run must keep eval_every, eval_rows and data.heldout then: they decide its numbers."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """bd3lm: how training attends under its mask. auto: FlexAttention on GPUs, SDPA elsewhere."""
    predict: int = 0
    """mtp: how many tokens are predicted in one call."""
    context: Literal["row", "drawn"] = "row"
    """mtp: predict the last tokens of every row, or those after a context of a length that is drawn anew in every step."""
    medusa: MedusaConfig = field(default_factory=MedusaConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        if min(self.layers, self.hidden, self.heads) < 1:
            raise ValueError(f"student.layers is {self.layers}, student.hidden {self.hidden}, student.heads {self.heads}; each must be at least 1")
        if self.mlp < 0:
            raise ValueError(f"student.mlp is {self.mlp}; it must be at least 0, which takes the usual width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"student.dropout is {self.dropout}; it must be in [0, 1), 0 for none")
        if len(self.clip) != 2:
            raise ValueError(f"student.clip is {list(self.clip)}; give two mask rates")
        self.clip = (self.clip[0], self.clip[1])  # JSON makes it a list
        if self.kind in ("ar", "medusa") and (self.backbone != "llama" or not self.tied):
            raise ValueError(f"student.backbone is {self.backbone}, student.tied {self.tied}; student.kind {self.kind} reads neither, drop them")
        usual = {spec.name: spec.default if spec.default_factory is MISSING else spec.default_factory() for spec in fields(self)}
        readers = dict.fromkeys(("block_size", "clip_search", "attention"), "bd3lm") | dict.fromkeys(("predict", "context"), "mtp")
        for name, kinds in (readers | {"medusa": "medusa", "clip": "mdlm or bd3lm"}).items():
            if self.kind not in kinds.split(" or ") and getattr(self, name) != usual[name]:
                raise ValueError(f"student.{name} is {getattr(self, name)}, which only student.kind {kinds} reads (kind is {self.kind}); drop it")
        if self.noise.bare and self.kind != "ar":
            self.noise = self._all_parts()
        if self.noise.known and self.kind not in ("mdlm", "bd3lm", "mtp"):
            raise ValueError(f"student.noise.known is set, which only student.kind mdlm, bd3lm or mtp reads (kind is {self.kind}); drop it")

    def _all_parts(self) -> NoiseConfig:
        """What a student is given whose recipe names a kind of noise alone; which parts, was found by measurement (docs/ablation.md)."""
        between = [self.layers // 2] if self.layers > 1 else []
        drafts = list(range(1, self.medusa.heads_count + 1)) if self.kind == "medusa" else between
        return replace(
            self.noise, input="add" if self.kind == "mdlm" else "replace", projection="tied", prior="unigram", readout=True, drafts=drafts,
            draft_restart=bool(drafts) and self.kind != "medusa",
        )  # fmt: skip


@dataclass
class MixPart:
    """One dataset of a mixture."""

    path: str
    """Folder or URI of a finished noise dataset."""
    weight: float = 1.0
    """Its share of the samples, relative to the others'; above 0."""


@dataclass
class DataConfig:
    """What is read."""

    path: str = ""
    """Folder or URI (s3://, gs://) of a finished noise dataset."""
    mix: list[MixPart] = field(default_factory=list)
    """Several datasets instead, mixed by weight: [{path: A, weight: 3}, {path: B, weight: 1}]. The weight of a dataset that the teacher wrote
    (`python -m pipeline generate`), beside extracted text, is that of sequence-level distillation. A student of the text alone (noise.kind none
    or independent, token_kd 0) takes any text of one tokenizer; one that reads the noise, or kept entries, takes those of one teacher."""
    heldout: str = ""
    """Folder or URI of a held-out dataset, extracted or written by the teacher, for the printed evaluation; empty: none."""
    root_hash: str = ""
    """The root hash that the training dataset must have, as `inspect` prints it; empty: any."""
    check_hashes: bool = True
    """Check each shard's sha256 against its receipt when it is first opened."""
    open_shards: int = 256
    """How many shards of a dataset are kept open at most, or as many as one batch touches."""
    window: int = 0
    """Shards that are shuffled together; a run's order depends on it. 0: all shards of a folder up to 256, 16 at a URI."""
    ahead: int = 4
    """Batches that are made before they are needed."""
    cache: str = ""
    """Folder on this machine for shards of datasets at a URI, shared by runs and processes; empty: ~/.cache/gumbel-distillation."""
    cache_bytes: int = 68_719_476_736
    """How much the cache may hold; two windows of every dataset must fit."""


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
    explode: float = 100.0
    """Stop, and name the sequences, at a loss above this many times the running median, which counts as 1 nat a token at least and ln V at most
    (times the weights of student.objective), and as the latter in the first 16 steps; 0: only at NaN."""


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
    """How many checkpoints are kept, the newest; 0: all."""
    keep_best: bool = False
    """Keep the checkpoint of least held-out loss too, and write one whenever an evaluation is the best so far. Refused for students that
    see the dataset's own noise: theirs knows the text, so it ranks nothing; compare their samples with `python -m eval`."""
    tensorboard: bool = True
    """Write TensorBoard events beside the JSONL where tensorboard is installed."""
    wandb: str = ""
    """Weights & Biases project that gets the figures too; empty: none."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be in [0, 2^64)")
        for name, value, least in (
            ("log_every", self.log_every, 1), ("eval_every", self.eval_every, 0), ("eval_rows", self.eval_rows, 1),
            ("checkpoint_every", self.checkpoint_every, 0), ("keep_checkpoints", self.keep_checkpoints, 0), ("optim.steps", self.optim.steps, 1),
            ("data.open_shards", self.data.open_shards, 1), ("data.window", self.data.window, 0), ("data.ahead", self.data.ahead, 1),
            ("optim.global_batch", self.optim.global_batch, 1), ("optim.micro_batch", self.optim.micro_batch, 0),
            ("optim.explode", self.optim.explode, 0), ("optim.clip", self.optim.clip, 0), ("optim.warmup", self.optim.warmup, 0),
            ("optim.weight_decay", self.optim.weight_decay, 0), ("threads", self.threads, 0),
        ):  # fmt: skip
            if not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 0 < self.optim.lr < math.inf:
            raise ValueError(f"optim.lr is {self.optim.lr}; it must be above 0 and finite")
        if not 0 <= self.optim.ema < 1:
            raise ValueError(f"optim.ema is {self.optim.ema}; it must be in [0, 1), 0 for no average")
        if not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ValueError(f"optim.betas is {list(self.optim.betas)}; both must be in [0, 1)")
        if self.student.clip_search and not (self.data.heldout and self.eval_every):
            raise ValueError(
                f"student.clip_search is set, but data.heldout is {self.data.heldout!r} and eval_every {self.eval_every}: "
                "it searches at held-out evaluations; set both, or drop it"
            )
