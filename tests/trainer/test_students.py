"""Students against known answers: losses, information flow, noise options, folders."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from noise.storage import DatasetError
from tests.trainer.chain import write_chain
from trainer.chance import Chance
from trainer.config import NoiseConfig, StudentConfig
from trainer.data import NoiseDataset
from trainer.initialise import start_from
from trainer.students import build, load_student, save_student

V, L = 13, 8
EVERYTHING = NoiseConfig(kind="gumbel", input="add", projection="own", prior="unigram", readout=True, drafts=[1, 2])


def config(kind: str = "mdlm", noise: NoiseConfig | None = None, **more) -> StudentConfig:
    return StudentConfig(kind=kind, layers=2, hidden=16, heads=2, noise=noise or NoiseConfig(), **more)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    return NoiseDataset(write_chain(tmp_path_factory.mktemp("chain") / "dataset", ragged=True)).batch(np.arange(64))


def test_the_nelbo_of_a_student_that_knows_nothing_is_log_v_a_token(batch):
    student = build(config(), V, L)
    torch.nn.init.zeros_(student.model.norm.weight)
    total, steps = 0.0, 400
    for step in range(steps):
        total += float(student(batch, Chance(1, step, 64))[0].detach()) / batch.tokens() / steps
    assert total == pytest.approx(math.log(V), rel=0.02)


def test_the_nelbo_is_the_equation(batch):
    student, chance = build(config(), V, L), Chance(3, 5, 64)
    loss, figures = student(batch, chance)
    t = chance.times(batch.place_B)
    expected = 0.0
    for row in range(64):
        hidden = chance.masked(batch.sequence_id_B[row : row + 1], t[row : row + 1], L)[0] & batch.valid_BL[row]
        ids = batch.input_ids_BL[row].masked_fill(hidden, V)
        logits = student.logits(ids[None, : batch.length_B[row]])  # the row alone, without its padding
        token = batch.input_ids_BL[row][hidden]
        expected -= float((logits.log_softmax(-1)[torch.arange(len(token)), token] / t[row]).sum().detach())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(figures["nelbo"]) == pytest.approx(expected, rel=1e-4)


def test_streamed_noise_gives_the_loss_and_gradients_of_noise_that_is_made_once(batch):
    results = []
    for stream in (False, True):
        torch.manual_seed(0)
        student = build(config(noise=replace(EVERYTHING, stream=stream)), V, L)
        loss = student(batch, Chance(3, 5, 64))[0]
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in student.parameters())])
    for made, streamed in zip(*results, strict=True):
        torch.testing.assert_close(made, streamed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise", [NoiseConfig(), EVERYTHING], ids=["none", "everything"])
def test_micro_batches_add_up_to_the_batch(batch, noise):
    student, chance = build(config(noise=noise), V, L), Chance(3, 5, 64)
    whole = float(student(batch, chance)[0])
    assert sum(float(student(part, chance)[0]) for part in batch.split(16)) == pytest.approx(whole, rel=1e-5)


def test_an_ar_student_never_sees_the_future_and_a_masked_one_sees_both_sides():
    ids = torch.randint(0, V, (1, L))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % V
    ar = build(config("ar"), V, L)
    same = torch.isclose(ar.logits(ids), ar.logits(other), atol=1e-6).all(-1)[0]
    assert same[:5].all() and not same[5:].any()
    mdlm = build(config(), V, L)
    ids[0, [2, 7]], other[0, [2, 7]] = V, V
    assert not torch.isclose(mdlm.logits(ids), mdlm.logits(other), atol=1e-6).all(-1).any()


OPTIONS = {
    "replace": NoiseConfig(kind="gumbel", input="replace"),
    "add": NoiseConfig(kind="gumbel", input="add"),
    "tied": NoiseConfig(kind="gumbel", input="replace", projection="tied"),
    "unigram": NoiseConfig(kind="gumbel", input="replace", prior="unigram"),
    "readout": NoiseConfig(kind="gumbel", readout=True),
    "drafts": NoiseConfig(kind="gumbel", drafts=[1]),
    "restart": NoiseConfig(kind="gumbel", drafts=[1], draft_restart=True),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shift", [False, True])
def test_every_noise_option_uses_its_noise_and_trains_all_its_weights(batch, name, shift):
    student = build(config(noise=OPTIONS[name], shift=shift), V, L)
    student(batch, Chance(1, 1, 64))[0].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    ids = torch.full((2, L), V)
    ids[:, 0] = 0
    g = torch.randn(2 * (L - 1), V)
    quiet = student.logits(ids, g)
    loud = g.clone()
    loud[0, 4] += 5.0
    assert quiet.shape == (2 * (L - 1), V) and not torch.equal(quiet[0], student.logits(ids, loud)[0])
    assert torch.allclose(quiet[L - 1 :], student.logits(ids, loud)[L - 1 :])  # the other row does not see it


def test_the_readout_argmax_follows_the_noise_where_the_student_knows_nothing():
    student = build(config(noise=NoiseConfig(kind="gumbel", readout=True)), V, L)
    torch.nn.init.zeros_(student.model.norm.weight)
    ids = torch.full((1, L), V)
    g = torch.randn(L, V)
    assert torch.equal(student.logits(ids, g).argmax(-1), g.argmax(-1))


def test_the_independent_control_never_reads_the_datasets_noise(batch):
    from dataclasses import replace

    student, chance = build(config(noise=NoiseConfig(kind="independent", input="replace")), V, L), Chance(1, 1, 64)
    elsewhere = replace(batch, seed_B=batch.seed_B + 1, sketch=replace(batch.sketch, log_prob_N=batch.sketch.log_prob_N - 3))
    assert torch.equal(student(batch, chance)[0], student(elsewhere, chance)[0])
    informed = build(config(noise=NoiseConfig(kind="gumbel", input="replace")), V, L)
    assert not torch.equal(informed(batch, chance)[0], informed(elsewhere, chance)[0])


def test_tied_projection_and_readout_cost_no_vocabulary_sized_weights():
    count = {
        name: sum(p.numel() for p in build(config(noise=option), V, L).parameters()) for name, option in {"none": NoiseConfig(), **OPTIONS}.items()
    }
    assert count["replace"] - count["none"] == V * 16
    assert count["tied"] == count["none"] and count["readout"] == count["none"] + 17


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (NoiseConfig(kind="none", input="replace"), "would be ignored"),
        (NoiseConfig(kind="gumbel", prior="unigram"), "no input, readout or draft uses it"),
        (NoiseConfig(kind="gumbel", drafts=[3]), r"of 1\.\.2"),
        (NoiseConfig(kind="gumbel", drafts=[1, 1]), "each layer once"),
        (NoiseConfig(kind="gumbel", readout=True, prior="unigram"), r"prior \(unigram\) .* would be ignored"),
        (NoiseConfig(kind="gumbel", readout=True, draft_restart=True), "names no layer"),
    ],
)
def test_options_that_would_be_ignored_are_refused(noise, message):
    with pytest.raises(ValueError, match=message):
        build(config(noise=noise), V, L)


@pytest.mark.parametrize(
    ("changes", "message"), [({"heads": 0}, "student.heads 0; each must be at least 1"), ({"clip": [0.5]}, "give two mask rates")]
)
def test_shapes_that_are_none_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StudentConfig(**changes)


@pytest.mark.parametrize("noise", [NoiseConfig(), EVERYTHING], ids=["none", "everything"])
def test_a_saved_masked_student_loads_equal(tmp_path, noise):
    student = build(config(noise=noise), V, L).eval()
    save_student(tmp_path, student, student.state_dict(), {"a": 1}, {"root_hash": "x"})
    loaded = load_student(tmp_path)
    ids, g = torch.full((1, L), V), torch.randn(L, V)
    assert torch.equal(student.logits(ids, g), loaded.logits(ids, g))
    assert loaded.recipe == {"a": 1} and loaded.provenance == {"root_hash": "x"} and loaded.mask_id == V


def test_a_saved_ar_student_is_a_hugging_face_model_with_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    student = build(config("ar"), V, 2 * L).eval()
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_student(tmp_path, student, student.state_dict(), {}, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, V, (3, 2 * L))
    assert torch.allclose(theirs(ids).logits, student.logits(ids), atol=1e-4)
    assert torch.allclose(load_student(tmp_path).logits(ids), student.logits(ids), atol=1e-6)


def test_a_masked_student_starts_from_a_causal_model_and_says_what_fits(tmp_path):
    ar = build(config("ar"), V, L)
    save_student(tmp_path, ar, ar.state_dict(), {}, {})
    student = build(config(noise=EVERYTHING), V, L)
    lines = start_from(student, tmp_path)
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, ar.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(student.model.embed_tokens.weight[:V], ar.model.embed_tokens.weight)
    assert any("readout.scale.weight (not in the checkpoint)" in line for line in lines)
    wider = build(StudentConfig(layers=2, hidden=32, heads=2), V, L)
    with pytest.raises(DatasetError, match="no tensor fits"):
        start_from(wider, tmp_path)


def test_folders_that_are_no_student_are_refused_by_name(tmp_path):
    with pytest.raises(DatasetError, match="not a student"):
        load_student(tmp_path)
    student = build(config(), V, L)
    save_student(tmp_path, student, student.state_dict(), {}, {})
    other = build(config(noise=EVERYTHING), V, L)
    save_student(tmp_path / "other", other, other.state_dict(), {}, {})
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(DatasetError, match="another student"):
        load_student(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(DatasetError, match="truncated or damaged"):
        load_student(tmp_path)
