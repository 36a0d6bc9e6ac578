"""The teacher writes from the noise: what it writes, and what a row says of it. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from noise import philox
from noise.dataset import Manifest
from noise.posterior import posterior_gumbel
from noise.receipt import committed
from noise.storage import DatasetError
from pipeline import config
from pipeline.generate import CERTAIN, Choice, write
from pipeline.teacher import Teacher
from pipeline.tokenizer import Tokenizer
from tests.pipeline.world import VOCAB, World
from tests.pipeline.written import BLOCK, WIDE, choice_of, finish, from_prompts, make_world, plan, rows_of, save_model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("written"))


def open_choice(vocab_size: int, stop: int | None = None, temperature: float = 1.0) -> Choice:
    return Choice(temperature, torch.zeros(vocab_size, dtype=torch.bool), stop)


@pytest.mark.parametrize("stop", ["eos", "never"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokens_are_those_of_generate_with_left_padding_and_a_logits_processor(world: World, kind: str, stop: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(world.root / kind), dtype=torch.float64).eval()
    model.generation_config.eos_token_id = None
    given = [[0, 5, 9, 30, 2, 77], [0], [0, 41, 8]]
    longest = max(map(len, given))
    pad_B = torch.tensor([longest - len(row) for row in given])
    left_BP = torch.tensor([[0] * (longest - len(row)) + row for row in given])
    sequence_id_B = torch.tensor([7, 2**40 + 1, -3])
    eos = 13

    def add_noise(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        position_B = ids_BT.shape[1] - pad_B  # the row's own, not the padded one
        return torch.log_softmax(logits_BV.double() / 0.8, -1) + philox.gumbel(philox.rows(99, sequence_id_B, position_B), WIDE)

    options = {"eos_token_id": eos, "pad_token_id": 0} if stop == "eos" else {"pad_token_id": 0}
    written_BT = model.generate(
        left_BP, attention_mask=(torch.arange(longest) >= pad_B[:, None]).long(), logits_processor=[add_noise], do_sample=False,
        max_new_tokens=BLOCK - 1, **options,
    )  # fmt: skip
    right_BP = torch.tensor([row + [0] * (longest - len(row)) for row in given])
    teacher = Teacher(config.Teacher(model=str(world.root / kind), dtype="float64", attention="eager"), WIDE)
    choice = open_choice(WIDE, eos if stop == "eos" else None, temperature=0.8)
    ids_BL, length_B, log_prob_BL = write(teacher, choice, 99, sequence_id_B, right_BP, torch.tensor([len(row) for row in given]), BLOCK)
    for row, (pad, length) in enumerate(zip(pad_B.tolist(), length_B.tolist(), strict=True)):
        assert torch.equal(ids_BL[row, :length], written_BT[row, pad : pad + length])
        assert length == BLOCK if stop == "never" else length == BLOCK or ids_BL[row, length - 1] == eos
        assert not ids_BL[row, length:].any()
        position_L = torch.arange(BLOCK)
        assert torch.equal(log_prob_BL[row] < 0, (position_L >= len(given[row])) & (position_L < length))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_in_float64_rows_do_not_depend_on_what_they_are_batched_with(world: World, kind: str) -> None:
    teacher = {"model": str(world.root / kind), "dtype": "float64", "attention": "eager"}
    one, other = (rows_of(finish(from_prompts(world, f"{kind}-{size}", teacher=teacher | {"micro_batch": size}))) for size in (1, 7))
    assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.length, other.length)
    assert np.allclose(one.log_prob, other.log_prob, rtol=1e-6, atol=0)
    assert len(set(one.has_noise("sequential").argmax(1))) > 2, "prompts have several lengths"


def test_a_prompt_is_given_and_each_of_its_rows_goes_on_with_noise_of_its_own(world: World) -> None:
    job = from_prompts(world, "given", stop="never")
    rows, tokenizer = rows_of(finish(job)), job.tokenizer
    documents = [document.text for document in job.corpus.documents()]
    given = [[tokenizer.bos, *ids[:9]] for ids in tokenizer.encode(documents) for _ in range(2)]
    assert [row[: len(start)].tolist() for row, start in zip(rows.input_ids, given, strict=True)] == given
    assert np.array_equal(rows.has_noise("sequential"), np.arange(BLOCK) >= np.array([len(start) for start in given])[:, None])
    assert not any(np.array_equal(rows.input_ids[row], rows.input_ids[row + 1]) for row in range(0, len(rows), 2))
    totals = Manifest.read(job.folder).totals
    assert totals["tokens"] == (rows.log_prob < 0).sum() and totals["kept"] == totals["characters_in"] == 0


def test_ids_that_the_tokenizer_does_not_have_are_never_chosen_and_special_tokens_where_asked(world: World) -> None:
    allowed, masked = plan(world, "allowed", stop="never"), plan(world, "masked", stop="never", special_tokens="masked")
    special = {masked.tokenizer.bos, masked.tokenizer.eos}
    assert allowed.plan.identity["generation"]["masked_ids"]["count"] == 12
    assert masked.plan.identity["generation"]["masked_ids"]["count"] == 14
    ends = plan(world, "ends", special_tokens="masked")
    assert ends.plan.identity["generation"]["masked_ids"]["count"] == 13, "EOS ends rows, so it can be chosen"
    for job in (allowed, masked):
        tokens = rows_of(finish(job)).input_ids[:, 1:]
        assert tokens.max() < VOCAB
    assert not special & set(tokens.flatten().tolist())
    choice = choice_of(masked)
    probabilities = choice.log_probs(torch.randn(4, WIDE, dtype=torch.float64)).exp()
    assert torch.allclose(probabilities.sum(1), torch.ones(4, dtype=torch.float64)) and not probabilities[:, choice.masked_V].any()
    assert allowed.plan.identity["seed"] != masked.plan.identity["seed"]


def test_log_prob_is_below_zero_for_a_token_that_is_certain() -> None:
    logits_V = torch.tensor([0.0, 1e4, 0.0])
    sure = SimpleNamespace(device=torch.device("cpu"), follow=lambda ids_BT, cache=None: (logits_V.expand(len(ids_BT), 3), None))
    ids_BL, _, log_prob_BL = write(
        sure, open_choice(3), 1, torch.arange(2), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int64), 5
    )  # type: ignore[arg-type]
    assert (ids_BL[:, 1:] == 1).all() and (log_prob_BL[:, 1:] == CERTAIN).all() and CERTAIN < 0


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows int64 [40000, 3] of a teacher with 6 tokens, its log-probs after BOS [6], and after BOS and each token [6, 6]), float64."""
    folder = save_model(tmp_path_factory.mktemp("tiny"), "gpt2", vocab_size=6)
    teacher = Teacher(config.Teacher(model=str(folder), dtype="float64"), 6)
    count = 40_000
    start = torch.zeros(count, 1, dtype=torch.int64), torch.ones(count, dtype=torch.int64)
    ids_BL, _, _ = write(teacher, open_choice(6, temperature=2.0), 5, torch.arange(count), *start, 3)
    contexts = torch.stack([torch.zeros(6, dtype=torch.int64), torch.arange(6)], 1)
    (_, logits_NV), = list(teacher.logits(contexts, torch.arange(12)))  # fmt: skip
    log_probs_NV = torch.log_softmax(logits_NV / 2.0, -1)
    return ids_BL, log_probs_NV[0], log_probs_NV[1::2]


def test_what_is_written_is_a_sample_of_the_teacher(pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    from scipy.stats import chisquare

    ids_BL, first_V, second_VV = pairs
    found = torch.bincount(ids_BL[:, 1] * 6 + ids_BL[:, 2], minlength=36).double()
    expected = (first_V[:, None] + second_VV).exp().flatten() * len(ids_BL)
    enough = expected > 5
    pooled = [torch.cat([part[enough], part[~enough].sum()[None]]).numpy() for part in (found, expected)]
    pooled = [part[:-1] if pooled[1][-1] < 5 else part for part in pooled]
    pooled[1] *= pooled[0].sum() / pooled[1].sum()
    assert enough.sum() > 15 and chisquare(*pooled).pvalue > 1e-3


def test_noise_given_the_token_has_the_law_of_the_parallel_posterior(pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    from scipy.stats import ks_2samp

    ids_BL, first_V, _ = pairs
    for token in torch.bincount(ids_BL[:, 1]).topk(3).indices.tolist():
        chosen_N = (ids_BL[:, 1] == token).nonzero()[:, 0]
        prior_NV = philox.gumbel(philox.rows(5, chosen_N, torch.ones_like(chosen_N)), 6)
        token_N = torch.full_like(chosen_N, token)
        other_N5 = philox.rows(6, chosen_N, torch.ones_like(chosen_N))
        posterior_NV = posterior_gumbel(first_V.float().expand(len(chosen_N), 6), token_N, other_N5)
        for entry in range(6):
            assert ks_2samp(prior_NV[:, entry].numpy(), posterior_NV[:, entry].numpy()).pvalue > 1e-4


def test_a_prompt_that_leaves_no_room_and_nan_logits_are_errors_that_name_the_row(world: World) -> None:
    with pytest.raises(DatasetError, match=r"shard 0, row \d+: BOS and prompt have \d+ tokens, which leaves no room to write in a block of 5; raise"):
        from_prompts(world, "long", prompt_tokens=None, block_length=5).extract(0)
    job = plan(world, "nan", rows=4)
    job.teacher._model.get_output_embeddings().weight.data[:] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(DatasetError, match=r"shard 0, row 0, position 1: the teacher's log-prob of the token is nan \(NaN or infinite logits\)"):
        job.extract(0)
    assert committed(job.folder) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": None}, "generate.rows is null: say how many rows"),
        ({"samples": 2}, "generate.samples is 2 but generate.prompts is bos, where it means nothing"),
        ({"prompts": "corpus"}, "generate.rows is 30 but generate.prompts is corpus"),
        ({"stop": "full"}, "generate.stop is 'full'; it must be one of eos, never"),
        ({"block_length": 65}, "generate.block_length is 65, but the teacher .* has 64 positions"),
        ({"corpus": {"files": "x.txt"}}, "generate.prompts is bos, so nothing of it would be read"),
    ],
)
def test_settings_that_cannot_be_used_or_would_be_ignored_are_refused(world: World, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(world, "refused", **settings)


def test_another_rule_in_the_same_folder_is_refused_by_field(world: World) -> None:
    plan(world, "ruled")
    with pytest.raises(DatasetError, match=r"generation\.stop: 'never' here, 'eos' there"):
        plan(world, "ruled", stop="never")
    with pytest.raises(DatasetError, match=r"generation\.masked_ids"):
        plan(world, "ruled", special_tokens="masked")


def test_inspect_and_card_say_who_wrote_the_text(world: World) -> None:
    from pipeline.card import write_card
    from pipeline.inspect import in_words, summary

    job = from_prompts(world, "described")
    folder = finish(job)
    words = in_words(folder)
    assert "prompts of at most 9 tokens" in words and "2 a prompt" in words and "12 ids masked" in words and "the prior draw" in words
    assert "kept" not in summary(folder)["per_token"] and json.dumps(summary(folder))
    write_card(folder, job.plan, Manifest.read(folder))
    card = (folder / "README.md").read_text()
    assert "begins with BOS and a prompt (its first 9 tokens)" in card and "EOS ends a row" in card
    assert "written by the teacher, from BOS alone" in in_words(finish(plan(world, "described-bos")))


def test_tokenizer_knows_its_ids(world: World) -> None:
    tokenizer = Tokenizer(world.root / "tokenizer")
    assert tokenizer.ids() == set(range(VOCAB)) and tokenizer.special_ids() == {tokenizer.bos, tokenizer.eos}


def test_students_are_given_the_noise_that_wrote_the_text_and_are_never_asked_for_a_prompt(world: World, tmp_path: Path) -> None:
    from trainer.__main__ import main as train
    from trainer.chance import Chance
    from trainer.data import NoiseDataset

    job = from_prompts(world, "lesson", teacher={"dtype": "float64"}, samples=4)
    dataset, rows = NoiseDataset(finish(job)), rows_of(job.folder)
    batch = dataset.batch(np.arange(len(dataset)))
    assert np.array_equal(batch.valid_BL.numpy(), rows.has_noise("sequential"))
    assert batch.tokens() == sum(part.tokens() for part in batch.split(7)) == dataset.manifest.totals["tokens"]
    where_N = batch.valid_BL.flatten().nonzero()[:, 0]
    ((_, logits_NV),) = list(job.teacher.logits(batch.input_ids_BL, where_N - 1))  # type: ignore[union-attr]
    choice = choice_of(job)
    assert torch.equal((choice.log_probs(logits_NV) + batch.noise_at(where_N)).argmax(-1), batch.input_ids_BL.flatten()[where_N])
    masked_BL = Chance(1, 0, len(dataset)).masked(batch.sequence_id_B, torch.ones(len(dataset)), BLOCK) & batch.valid_BL
    assert torch.equal(masked_BL, batch.valid_BL)
    settings = {
        "output": tmp_path / "student", "data.path": job.folder, "student.layers": 1, "student.hidden": 16, "student.heads": 2,
        "student.noise.kind": "gumbel", "student.noise.readout": "true", "optim.global_batch": 8, "optim.steps": 40, "optim.lr": 1e-2,
        "optim.warmup": 1, "log_every": 20, "eval_every": 0, "device": "cpu", "threads": 1, "tensorboard": "false",
    }  # fmt: skip
    assert train([part for name, value in settings.items() for part in (f"--{name}", str(value))]) == 0
    first, last = (json.loads(line)["train/nelbo"] for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[:2])
    assert last < first


def test_prompts_of_token_ids_are_taken_as_they_are(world: World) -> None:
    (world.root / "ids.jsonl").write_text("\n".join(json.dumps({"ids": ids}) for ids in ([5, 6, 7], [9])))
    corpus = {"files": str(world.root / "ids.jsonl"), "split": "all", "ids_field": "ids"}
    rows = rows_of(finish(plan(world, "ids", corpus=corpus, prompts="corpus", rows=None)))
    bos = Tokenizer(world.root / "tokenizer").bos
    assert rows.input_ids[0, :4].tolist() == [bos, 5, 6, 7] and rows.input_ids[1, :2].tolist() == [bos, 9]
