"""What shards need of a teacher, and what is said of a teacher or of log-probs that cannot be used. No Ray."""

import errno
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from noise import philox, sketch
from noise.dataset import Manifest, open_shard
from noise.decode import decode
from noise.receipt import committed
from noise.storage import DatasetError
from pipeline import config, teacher
from pipeline.extract import Job
from pipeline.plan import make_plan, write_plan
from pipeline.verify import verify, verify_shard
from pipeline.worker import Worker
from tests.pipeline.world import BLOCK, VOCAB, World, save_teacher


def save(folder: Path, kind: str) -> Path:
    """A tiny model of the family `kind`."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    settings = {
        "llama": lambda: transformers.LlamaConfig(**common),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=90, n_embd=16, n_layer=1, n_head=2, n_positions=64),
        "gemma2": lambda: transformers.Gemma2Config(**common, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.5),
        "granite": lambda: transformers.GraniteConfig(**common, num_key_value_heads=1, logits_scaling=3.0, initializer_range=0.5),
    }[kind]()
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(("kind", "by_head"), [("llama", True), ("gpt2", True), ("gemma2", False), ("granite", False)])
def test_log_probs_are_the_models_own_in_float32_whatever_comes_after_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, by_head: bool
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(teacher, "CHUNK_ENTRIES", 90 * 7)
    folder = save(tmp_path / kind, kind)
    loaded = teacher.Teacher(config.Teacher(model=str(folder), attention="eager", temperature=0.7), 90)
    assert (loaded._head is not None) == by_head
    ids_BL = torch.randint(0, 90, (3, 9))
    at_N = torch.tensor([0, 3, 8, 9, 10, 11, 12, 13, 20, 26])
    parts = list(loaded.log_probs(ids_BL, at_N))
    with torch.no_grad():
        logits_BLV = AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")(ids_BL).logits
    expected_NV = torch.log_softmax(logits_BLV.flatten(0, 1)[at_N].double() / 0.7, -1)
    assert [part for part, _ in parts] == [slice(0, 7), slice(7, 10)]
    assert torch.allclose(torch.cat([log_probs for _, log_probs in parts]).double(), expected_NV, atol=1e-5)


def test_the_weights_hash_follows_the_weights_and_other_formats_are_refused(tmp_path: Path) -> None:
    first, second = teacher.weights_hash(save(tmp_path / "a", "llama")), teacher.weights_hash(save(tmp_path / "b", "llama"))
    assert first == second != teacher.weights_hash(save(tmp_path / "c", "gpt2"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"no \.safetensors weights"):
        teacher.weights_hash(tmp_path / "d")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    assert made.run("tokenizer") == 0
    save_teacher(made.root / "teacher")
    return made


def job(world: World, name: str, **changes: object) -> Job:
    """A dataset that is planned, with its teacher in this process."""
    recipe = world.recipe(output=world.root / name, **({"teacher.model": world.root / "teacher"} | changes))
    plan, corpus, tokenizer = make_plan(recipe)
    standing = write_plan(recipe, plan, tokenizer)
    return Job(Path(recipe.output), standing, corpus, tokenizer, teacher.Teacher(recipe.teacher, plan.identity["vocab_size"]))


def test_the_token_wins_under_the_teacher_with_the_decoded_noise_in_every_draw(world: World) -> None:
    made = job(world, "draws", noise__draws=2, noise__epsilon=0.2)
    receipt = made.extract(1)
    metadata = made.plan.metadata(1)
    for rows in open_shard(made.folder, receipt, made.plan.identity):
        for row in range(len(rows)):
            one, length = rows[row : row + 1], int(rows.length[row])
            ids_BL = torch.from_numpy(one.input_ids.astype("int64"))
            ((_, log_probs_NV),) = list(made.teacher.log_probs(ids_BL, torch.arange(length - 1)))  # type: ignore[union-attr]
            kept_N, log_prob_N = (torch.from_numpy(value[0, 1:length].copy()) for value in (one.kept, one.log_prob))
            entries = (torch.from_numpy(value.astype("int64")) for value in (one.index, one.code))
            kept = sketch.Sketch(log_prob_N, kept_N.to(torch.int64), *entries)
            for draw in range(2):
                rows_N5 = philox.rows(int(metadata.seed), torch.full((length - 1,), int(one.sequence_id[0])), torch.arange(1, length), draw)
                g_NV = decode(kept, ids_BL[0, 1:length], rows_N5, metadata.codec)
                assert torch.equal((log_probs_NV + g_NV).argmax(-1), ids_BL[0, 1:length])


def test_a_shard_is_the_same_bytes_whatever_was_made_before_it(world: World) -> None:
    one, other = job(world, "forwards"), job(world, "backwards")
    assert [one.extract(shard) for shard in (0, 1, 2)] == [other.extract(shard) for shard in (2, 1, 0)][::-1]


def test_a_committed_shard_is_not_made_again(world: World) -> None:
    made = job(world, "twice")
    receipt = made.extract(0)
    assert made.extract(0) == receipt and committed(made.folder) == {0: receipt}


def test_nan_logits_are_an_error_that_names_shard_and_row_and_write_nothing(world: World) -> None:
    save_teacher(world.root / "poisoned", poison=" river", tokenizer=world.root / "tokenizer")
    made = job(world, "nan", teacher__model=world.root / "poisoned")
    with pytest.raises(DatasetError, match=r"shard 2, row \d+, position \d+: the teacher's log-prob of the token is nan \(NaN or infinite logits\)"):
        made.extract(2)
    assert list((made.folder / "shards").iterdir()) == []


def test_a_token_id_that_the_teacher_does_not_have_is_an_error_that_names_it(world: World) -> None:
    save_teacher(world.root / "narrow", vocab_size=VOCAB - 40)
    made = job(world, "narrow-data", teacher__model=world.root / "narrow")
    with pytest.raises(DatasetError, match=rf"shard 0, row \d+, position \d+: token id \d+ is not below the teacher's width {VOCAB - 40}"):
        made.extract(0)
    assert committed(made.folder) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing.block_length": 65}, "block_length is 65, but the teacher .* has 64 positions"),
        ({"teacher.attention": "imagined"}, "cannot be loaded as a causal LM .*imagined attention"),
        ({"teacher.revision": "main"}, "teacher.revision is 'main', but .* is a local folder"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_when_planning(world: World, changes: dict[str, object], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        job(world, "misfit", **changes)


def test_a_teacher_over_several_devices_needs_accelerate_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match="device_map is 'auto', which needs the package accelerate: install it, or leave device_map null"):
        job(world, "spread", teacher__device_map="auto")


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_a_teacher_over_several_devices_says_the_same(world: World) -> None:
    spread, alone = job(world, "spread-data", teacher__device_map="auto"), job(world, "alone-data")
    assert spread.plan.environment["numerics"]["device_map"] == "auto" and spread.plan.identity == alone.plan.identity
    assert spread.extract(0).nll_sum == pytest.approx(alone.extract(0).nll_sum, rel=1e-5)


def test_a_compiled_teacher_is_part_of_the_plan_and_one_that_cannot_be_compiled_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, eager = job(world, "compiled", teacher__compile="true"), job(world, "eager")
    assert compiled.plan.environment["numerics"]["compile"] is True and "compile" not in eager.plan.environment["numerics"]
    assert compiled.extract(0).nll_sum == pytest.approx(eager.extract(0).nll_sum, rel=1e-5)
    with pytest.raises(DatasetError, match=r"teacher\.compile: None here, True there"):
        job(world, "compiled")

    def broken(function: object, **options: object) -> object:
        def call(*args: object, **kwargs: object) -> None:
            raise RuntimeError("no C++ compiler\nin detail")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(DatasetError, match="the teacher cannot be compiled here: no C\\+\\+ compiler; set it to false"):
        job(world, "compiled", teacher__compile="true")
    with pytest.raises(ValueError, match="the teacher writes token by token, which is not compiled"):
        config.GenerateRecipe(teacher=config.Teacher(compile=True), generate=config.Generate(rows=1))


def test_what_decides_bits_cannot_change_within_a_dataset(world: World) -> None:
    job(world, "numerics")
    with pytest.raises(DatasetError, match=r"teacher\.micro_batch: 5 here, 4 there"):
        job(world, "numerics", teacher__micro_batch=5)
    with pytest.raises(DatasetError, match=r"teacher\.weights_sha256"):
        save_teacher(world.root / "retrained", poison=" river", tokenizer=world.root / "tokenizer")
        job(world, "numerics", teacher__model=world.root / "retrained")


def test_a_worker_reports_a_full_disk_as_fatal_and_commits_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(world, "full")
    worker = Worker(world.recipe(output=made.folder, teacher__model=world.root / "teacher"), made.corpus.roots)
    assert not worker.load().failure

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    outcome = worker.extract(0)
    assert outcome.fatal and outcome.failure == "shard 0: No space left on device"
    assert list((made.folder / "shards").iterdir()) == []


def test_verify_finds_an_entry_that_the_noise_stream_does_not_explain(world: World) -> None:
    from dataclasses import replace

    from noise.commit import commit_shard

    made = job(world, "forged")
    receipts = [made.extract(shard) for shard in range(len(made.plan.shards))]
    Manifest.write(made.folder, made.plan)
    verify(made.folder)
    rows = list(open_shard(made.folder, receipts[0], made.plan.identity))
    code = rows[0].code.copy()
    code[3] = 255  # a probability of e^-31.9 moves nothing
    forged = commit_shard(
        made.folder / "forgery", made.plan.metadata(0), [replace(rows[0], entries=(rows[0].index, code)), *rows[1:]], receipts[0].characters_in
    )
    with pytest.raises(DatasetError, match=r"00000\.arrow, row 0: a kept entry that no draw of the noise stream explains"):
        verify_shard(open_shard(made.folder / "forgery", forged, made.plan.identity), forged, made.plan.identity)


def test_blocks_of_the_dataset_have_the_length_of_the_recipe(world: World) -> None:
    made = job(world, "shape")
    assert next(iter(open_shard(made.folder, made.extract(0), made.plan.identity))).input_ids.shape[1] == BLOCK
