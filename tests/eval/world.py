"""A whole small world on disk: a tokenizer of words, causal LMs, a held-out dataset with noise, and students."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from noise.commit import commit_shard
from noise.dataset import Manifest, Plan
from noise.sketch import Codec
from tests.noise.teachers import BigramTeacher, identity_of, rows_of
from trainer.config import MedusaConfig, NoiseConfig, StudentConfig
from trainer.students import build, save_student

VOCAB, LENGTH = 24, 8


def write_tokenizer(folder: Path, vocab_size: int = VOCAB) -> None:
    """Token i is the word `w<i>`; 0 is BOS, 1 is EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w1").save_pretrained(folder)


def write_letter_tokenizer(folder: Path) -> None:
    """Every character is a token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(["<s>", " ", "w", *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)


def write_causal(folder: Path, seed: int, vocab_size: int = VOCAB, context: int = 64) -> None:
    """A tiny Llama with random weights that are large enough to have opinions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=context, initializer_range=0.3, **shape))
    model.save_pretrained(folder)


def write_heldout(folder: Path, rows: int = 40, extraction: str = "parallel", length: int = LENGTH, vocab_size: int = VOCAB) -> None:
    """Rows of a bigram teacher; the last one is shorter than the block, as at the end of a real shard."""
    teacher, codec = BigramTeacher(vocab_size), Codec(vocab_size)
    plan = Plan(identity_of(codec, length, extraction), {}, [{}])
    plan.write(folder)
    length_B = torch.full((rows,), length)
    length_B[-1] = length - 1
    commit_shard(folder, plan.metadata(0), [rows_of(teacher, plan.metadata(0), teacher.texts(rows, length, seed=3), length_B)], characters_in=rows)
    Manifest.write(folder, plan)


def write_student(
    folder: Path, kind: str = "mdlm", seed: int = 0, length: int = LENGTH, noise: NoiseConfig | None = None, backbone: Path | None = None
) -> None:
    """An untrained student with weights large enough that its choices differ from position to position."""
    torch.manual_seed(seed)
    shape = {"medusa": MedusaConfig(str(backbone), heads_count=3)} if backbone else {"layers": 2, "hidden": 16, "heads": 2}
    student = build(StudentConfig(kind=kind, noise=noise or NoiseConfig(), **shape), VOCAB, length)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "norm" not in name:
                weight.add_(0.4 * torch.randn_like(weight))
    save_student(folder, student, student.state_dict(), {}, {"dataset": str(folder.parent / "heldout"), "root_hash": "ab"})


def write_world(folder: Path) -> Path:
    """heldout/ with its tokenizer, teacher/, judge/, students plain/, gumbel/, independent/."""
    write_heldout(folder / "heldout")
    write_tokenizer(folder / "heldout" / "tokenizer")
    for name, seed in (("teacher", 1), ("judge", 2)):
        write_causal(folder / name, seed)
        write_tokenizer(folder / name)
    write_student(folder / "plain", seed=1)
    write_student(folder / "gumbel", seed=2, noise=NoiseConfig(kind="gumbel", input="replace", readout=True))
    write_student(folder / "independent", seed=3, noise=NoiseConfig(kind="independent", input="replace"))
    return folder


def random_rows(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """int32 [S, L] rows that begin with BOS."""
    ids = np.random.default_rng(seed).integers(2, VOCAB, size=(rows, length)).astype(np.int32)
    ids[:, 0] = 0
    return ids


def write_blocks(folder: Path) -> None:
    torch.manual_seed(7)
    noise = NoiseConfig(kind="gumbel", input="replace", readout=True)
    student = build(StudentConfig(kind="bd3lm", layers=2, hidden=16, heads=2, block_size=4, noise=noise), VOCAB, LENGTH)
    save_student(folder, student, student.state_dict(), {"optim": {"steps": 77}}, {"dataset": "d", "root_hash": "cd", "identity": {"seed": "<99>"}})
