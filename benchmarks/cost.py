"""What a dataset will cost before it is made: GPU hours, bytes, requests. Arithmetic, and rates where they were measured.

    python -m benchmarks.cost
    python -m benchmarks.cost --tflops 989 --gpu "H100, 16 bits"
    python -m benchmarks.cost --recipes '[mine.yaml]' --tokens 2e9 --documents 1e6 --characters 9e9 --tokens_a_second 40000

GPU hours are an **estimate**: the FLOPs of the forward, over the GPU's peak times an assumed utilisation, and an assumed share
for everything else. No GPU's rate was measured for the defaults. A rate of your own GPU replaces it (`--tokens_a_second`);
where `benchmarks.encode` measured a teacher of the same size, the hours at its rate are beside it.

    flops     rows L (2 layers w + 2 layers L H)  +  noise (2 H V)        w weights of a layer's products; causal attention
    bytes     rows (fixed columns of L positions)  +  noise kept (bytes of an entry)        docs/noise.md, "Bytes"
    PUT       shards (1 + p) + 10: receipt and shard, in p = 2 + bytes / 10 MiB requests above 10 MiB, else 1; plan, manifest, card, ...
    GET       2 characters / 4 MiB, planning and extraction each read the corpus once; shards (5 + bytes / 8 MiB): each commit reads back
    LIST      2 shards / 1000, at each start

Instant. Letters: L block length, H hidden, V vocabulary, noise = positions with noise.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import results
from noise.folder import PIECE
from noise.shard import FORMAT_VERSION, Layout, ShardMetadata
from noise.sketch import Codec
from pipeline import config as recipes
from pipeline.files import READ_AHEAD

PART = 10 * 2**20
"""Of an upload by pyarrow."""


@dataclass(frozen=True)
class Text:
    """A corpus, in round figures."""

    documents: float
    characters: float
    tokens: float
    """Without EOS. Other tokenizers of this kind differ by a few percent, which is not accounted for."""


CORPORA = {
    "dvruette/lm1b": Text(30.3e6, 4.1e9, 0.85e9),  # 0.77 G words; 1.1 tokens a word is a guess
    "Skylion007/openwebtext": Text(8.01e6, 39.5e9, 9.03e9),
}


@dataclass(frozen=True)
class Teacher:
    """What its forward multiplies."""

    layers: int
    hidden: int
    layer_weights: int
    """Weights of a layer's matrix products."""
    vocab_size: int

    def layer_flops(self, block_length: int) -> int:
        """Of all layers, for one position; under a causal mask it looks at half the block on average."""
        return self.layers * (2 * self.layer_weights + 2 * block_length * self.hidden)

    @property
    def head_flops(self) -> int:
        """Of the logits of one position."""
        return 2 * self.hidden * self.vocab_size


def gpt2(layers: int, hidden: int) -> Teacher:
    return Teacher(layers, hidden, 12 * hidden**2, 50_257)


def gated(layers: int, hidden: int, key_value: int, inner: int, vocab_size: int) -> Teacher:
    """Llama, Qwen: shared keys and values of width `key_value`, three products in the MLP."""
    return Teacher(layers, hidden, 2 * hidden**2 + 2 * hidden * key_value + 3 * hidden * inner, vocab_size)


TEACHERS = {
    "openai-community/gpt2": gpt2(12, 768),
    "openai-community/gpt2-large": gpt2(36, 1280),
    "Qwen/Qwen2.5-0.5B": gated(24, 896, 128, 4864, 151_936),
    "Qwen/Qwen2.5-1.5B": gated(28, 1536, 256, 8960, 151_936),
}


@dataclass
class Config:
    """Which datasets, and at what rates."""

    recipes: list[str] = field(default_factory=lambda: [f"recipes/{name}.yaml" for name in ("lm1b_gpt2", "owt_gpt2", "owt_gpt2_large", "owt_qwen")])
    """Recipes of the datasets: corpus, layout, teacher, codec."""
    tokens: float | None = None
    """Tokens of the corpus, where it is none of those known here; give documents and characters too."""
    documents: float | None = None
    """Its documents."""
    characters: float | None = None
    """Its characters."""
    gpu: str = "A10G, float32"
    """Name of the GPU and of the teacher's dtype, for the table."""
    tflops: float = 31.2
    """Its peak in that dtype, TFLOP/s, from its data sheet."""
    utilisation: float = 0.4
    """Share of the peak that the forward reaches: an assumption."""
    overhead: float = 0.1
    """What everything but the forward adds to it: an assumption."""
    tokens_a_second: float | None = None
    """Of one GPU, measured with this teacher; takes the place of the four above."""
    gpus: int = 8
    """GPUs at work."""
    kept: float | None = None
    """Entries kept a token; null = as measured by benchmarks.codec for this vocabulary at epsilon 1/8 and one draw."""
    rates: str = "benchmarks/results/encode.json"
    """Figures of benchmarks.encode; hours at its rate are shown for teachers of the same size."""
    output: str = "benchmarks/results/cost.json"
    """Where the figures go."""

    def __post_init__(self) -> None:
        given = [name for name in ("tokens", "documents", "characters") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(f"{given[0]} is given, but not all of tokens, documents and characters; one does not follow from another")
        for name in ("tflops", "utilisation", "gpus"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    def text(self, corpus: recipes.Corpus) -> Text:
        if self.tokens is not None and self.documents is not None and self.characters is not None:
            return Text(self.documents, self.characters, self.tokens)
        if corpus.dataset not in CORPORA:
            raise ValueError(f"corpus.dataset is {corpus.dataset!r}, whose size is not known here; give tokens, documents and characters")
        return CORPORA[corpus.dataset]


def rows_of(text: Text, packing: recipes.Packing) -> tuple[float, float]:
    """(rows, positions with noise), without the few that a shard's end leaves out."""
    own_eos = packing.block_end == "eos"
    if packing.policy == "concat":
        rows = (text.tokens + text.documents) / (packing.block_length - 1 - own_eos)
        return rows, rows * (packing.block_length - 1)
    rows = text.documents * max(1.0, (text.tokens / text.documents + 1) / (packing.block_length - 1))
    return rows, text.tokens + text.documents


def bytes_of(codec: Codec, block_length: int, rows: float, noise: float, kept: float) -> float:
    """Of the shards' columns, from the widths that the format gives them; Arrow's headers add a fraction of a percent."""
    metadata = ShardMetadata(FORMAT_VERSION, "1", codec.epsilon, codec.step, codec.draws, codec.vocab_size, block_length, "parallel", 0, "0" * 64)
    layout = Layout.of(metadata)
    position = layout.input_ids.bit_width // 8 + 4 + layout.kept.bit_width // 8
    row = 8 + 4 + 8 * 65 / 64 * len(layout.entries)
    return rows * (block_length * position + row) + noise * kept * sum(kind.bit_width // 8 for kind in layout.entries.values())


def measured_kept(codec: Codec) -> float:
    """Raises ValueError where benchmarks.codec measured no such codec."""
    for path in sorted(Path("benchmarks/results").glob("codec*.json")):
        figures = json.loads(path.read_text())
        if figures["settings"]["vocab_size"] == codec.vocab_size:
            for row in figures["teachers"]["simulated"]["codecs"]:
                if (row["codec"], row.get("epsilon"), row.get("draws")) == ("sketch", codec.epsilon, codec.draws):
                    return float(row["kept"])
    raise ValueError(f"entries kept at V = {codec.vocab_size:,}, epsilon {codec.epsilon}, {codec.draws} draws were not measured here; give kept")


def measured_rate(teacher: Teacher, path: Path) -> dict[str, Any] | None:
    """{tokens_a_second, block_length, hardware} of benchmarks.encode for a GPT-2 of this size; None where it measured no such teacher."""
    if not path.exists():
        return None
    figures = json.loads(path.read_text())
    if gpt2(figures["settings"]["layers"], figures["settings"]["hidden"]) != replace(teacher, vocab_size=50_257):
        return None
    rates = [row["tokens_a_second"]["sketch"] for row in figures["vocabularies"] if row["vocab_size"] == teacher.vocab_size]
    return {"tokens_a_second": rates[0], "block_length": figures["settings"]["block_length"], "hardware": figures["hardware"]} if rates else None


def requests(text: Text, shards: int, size: float) -> dict[str, int]:
    """Where corpus and dataset are on an object store. HEAD counts as GET, as it does on the bill."""
    each = size / shards
    uploads = 1 if each <= PART else 2 + math.ceil(each / PART)
    return {
        "put": shards * (1 + uploads) + 10,
        "get": 2 * math.ceil(text.characters / READ_AHEAD) + shards * (5 + math.ceil(each / PIECE)),
        "list": math.ceil(2 * shards / 1000),
    }


@functools.cache
def read(path: str) -> recipes.Recipe:
    from pipeline.__main__ import parse

    recipe: recipes.Recipe = parse(["extract", "--config", path])[1]
    return recipe


def price(config: Config, path: str) -> dict[str, Any]:
    """One row of the table."""
    recipe = read(path)
    if recipe.teacher.model not in TEACHERS:
        raise ValueError(f"{path}: teacher.model is {recipe.teacher.model!r}, whose size is not known here; it is one of {', '.join(TEACHERS)}")
    teacher, text, L = TEACHERS[recipe.teacher.model], config.text(recipe.corpus), recipe.packing.block_length
    codec = Codec(teacher.vocab_size, recipe.noise.epsilon, recipe.noise.draws)
    rows, noise = rows_of(text, recipe.packing)
    size = bytes_of(codec, L, rows, noise, config.kept if config.kept is not None else measured_kept(codec))
    flops = rows * L * teacher.layer_flops(L) + noise * teacher.head_flops
    seconds = flops * (1 + config.overhead) / (config.tflops * 1e12 * config.utilisation)
    if config.tokens_a_second is not None:
        seconds = noise / config.tokens_a_second
    shards = math.ceil(text.characters / recipe.packing.shard_characters)
    rate = measured_rate(teacher, Path(config.rates))
    return {
        "recipe": Path(path).stem,
        "rows": rows,
        "positions_with_noise": noise,
        "bytes": size,
        "bytes_a_token": size / noise,
        "flops": flops,
        "gpu_hours": seconds / 3600,
        "hours": seconds / 3600 / config.gpus,
        "seconds_a_shard": seconds / shards,
        "shards": shards,
        "requests": requests(text, shards, size),
        "measured": rate and rate | {"hours": noise / rate["tokens_a_second"] / 3600},
    }


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["recipe"],
        f"{row['positions_with_noise'] / 1e9:.2f} G",
        f"{row['rows'] / 1e6:.1f} M",
        f"{row['bytes_a_token']:.1f}",
        f"{row['bytes'] / 1e9:,.0f} GB",
        f"{row['flops'] / 1e18:.1f} E",
        f"{row['gpu_hours']:,.0f}",
        f"{row['hours']:,.1f}",
        f"{row['shards']:,}",
        f"{row['seconds_a_shard']:,.0f} s",
        f"{row['requests']['put']:,}",
        f"{row['requests']['get']:,}",
    ]


COLUMNS = ["dataset", "positions", "rows", "bytes a token", "bytes", "FLOPs", "GPU hours", "hours", "shards", "a shard", "PUT", "GET"]


def run(config: Config) -> list[dict[str, Any]]:
    """Price every recipe, write the JSON, return its rows."""
    rows = [price(config, path) for path in config.recipes]
    results.write(Path(config.output), asdict(config), {"datasets": rows})
    return rows


def show(config: Config) -> None:
    rows = run(config)
    rate = f"{config.gpu}: {config.tflops} TFLOP/s at {config.utilisation:.0%}, and {config.overhead:.0%} for the rest: an estimate, not measured"
    if config.tokens_a_second is not None:
        rate = f"{config.tokens_a_second:,.0f} tokens/s of one GPU, as given"
    results.show(f"{config.gpus} GPUs", COLUMNS, [cells(row) for row in rows], rate)
    for row in rows:
        if found := row["measured"]:
            where = ", ".join(found["hardware"]["gpus"]) or f"{found['hardware']['processor']}, {found['hardware']['threads']} threads"
            speed = f"{found['tokens_a_second']:,.0f} tokens/s in blocks of {found['block_length']:,}"
            print(f"{row['recipe']}: measured by benchmarks.encode on {where}: {speed}: {found['hours']:,.0f} hours")


if __name__ == "__main__":
    sys.exit(results.command("cost", (__doc__ or "").splitlines()[0], Config, show, None))
