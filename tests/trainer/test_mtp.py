"""The multi-token student: which tokens it predicts, what they see, and its loss."""

import numpy as np
import pytest
import torch

from tests.trainer.chain import write_chain
from trainer.chance import Chance
from trainer.config import NoiseConfig, StudentConfig
from trainer.data import NoiseDataset
from trainer.students import build, load_student, save_student

V, L, PREDICT = 13, 8, 3
EVERYTHING = NoiseConfig(kind="gumbel", input="add", prior="unigram", readout=True, drafts=[1, 2])


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    return NoiseDataset(write_chain(tmp_path_factory.mktemp("chain") / "dataset", ragged=True)).batch(np.arange(64))


def student(noise: NoiseConfig | None = None, **more):
    torch.manual_seed(0)
    config = StudentConfig("mtp", layers=2, hidden=16, heads=2, noise=noise or NoiseConfig(), **{"predict": PREDICT, **more})
    module = build(config, V, L)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("noise", [NoiseConfig(), EVERYTHING], ids=["none", "everything"])
def test_the_loss_is_the_mean_over_the_last_tokens_of_each_row_alone(batch, noise, shift):
    module = student(noise, shift=shift)
    loss, figures = module(batch, Chance(3, 5, 64))
    expected = hits = 0.0
    for row in range(64):
        length = int(batch.length_B[row])
        start = max(1, length - PREDICT)
        ids = batch.input_ids_BL[row : row + 1, :length].clone()
        ids[0, start:] = module.mask_id
        g = batch.noise_at(row * L + torch.arange(start, length)) if noise.kind != "none" else None
        logits, token = module.logits(ids, g).detach(), batch.input_ids_BL[row, start:length]
        share = (length - 1) / (length - start)
        expected -= share * float(logits.log_softmax(-1)[torch.arange(length - start), token].sum())
        hits += share * float((logits.argmax(-1) == token).sum())
    assert float(figures["cross_entropy"]) == pytest.approx(expected, rel=1e-4)
    assert float(figures["top1"]) == pytest.approx(hits, rel=1e-5)
    drafts = sum(float(figures[f"draft_{layer}"]) for layer in noise.drafts)
    assert float(loss.detach()) == pytest.approx(expected + 0.1 * drafts, rel=1e-4)
    assert sorted(figures) == sorted(module.figure_names)


@pytest.mark.parametrize("shift", [False, True])
def test_the_prefix_is_causal_and_every_masked_token_sees_the_prefix_and_all_noise_and_nothing_after(shift):
    module = student(NoiseConfig(kind="gumbel", input="replace"), shift=shift)
    torch.manual_seed(1)
    ids = torch.randint(0, V, (1, L))
    ids[0, 3:6] = module.mask_id
    g = torch.randn(3, V)
    quiet = module.logits(ids, g)
    for place, sees in ((0, True), (2, True), (6, False), (7, False)):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % V
        changed = ~torch.isclose(quiet, module.logits(other, g), atol=1e-6).all(-1)
        assert changed.tolist() == [sees] * 3
    for place in range(3):
        loud = g.clone()
        loud[place, 4] += 3.0
        assert not torch.isclose(quiet, module.logits(ids, loud), atol=1e-6).all(-1).any()
    visible = module._visible(ids == module.mask_id)[0, 0]
    before = 3 - shift
    assert torch.equal(visible[:before], torch.ones(L, L, dtype=torch.bool).tril()[:before])


def test_a_drawn_context_reaches_every_place_equally_often_and_depends_on_the_step_alone(tmp_path):
    batch = NoiseDataset(write_chain(tmp_path / "dataset")).batch(np.arange(64))
    module = student(context="drawn")
    count = torch.zeros(L)
    for step in range(200):
        masked = module._chosen(batch, Chance(1, step, 64))
        assert torch.equal(masked, module._chosen(batch, Chance(1, step, 64))) and (masked.sum(1) == PREDICT).all()
        assert ((masked.int().diff(dim=1) == 1).sum(1) == 1).all()  # one run of masks
        count += torch.bincount(masked.int().argmax(1), minlength=L)
    starts = L - PREDICT
    share = count[1 : 1 + starts] / count.sum()
    assert float(count[1 : 1 + starts].sum()) == 200 * 64 and torch.allclose(share, torch.full((starts,), 1 / starts), atol=0.01)
    whole = float(module(batch, Chance(1, 1, 64))[0].detach())
    parts = sum(float(module(part, Chance(1, 1, 64))[0].detach()) for part in batch.split(16))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_noise_tells_the_student_what_it_cannot_know(tmp_path):
    """Trained alike on the exact chain, held out: informed against none and against noise that knows nothing."""
    data = NoiseDataset(write_chain(tmp_path / "data", rows=512, shards=1))
    heldout = NoiseDataset(write_chain(tmp_path / "heldout", rows=128, shards=1, text_seed=9, seed=78)).batch(np.arange(128))
    found = {}
    for kind in ("none", "independent", "gumbel"):
        noise = NoiseConfig() if kind == "none" else NoiseConfig(kind=kind, readout=True)
        torch.manual_seed(0)
        module = build(StudentConfig("mtp", layers=2, hidden=32, heads=2, predict=PREDICT, noise=noise), V, L)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 150)  # without it the last steps' chance outweighs the noise
        for step in range(150):
            rows = data.batch(np.arange(step * 64, step * 64 + 64) % 512)
            (module(rows, Chance(1, step, 64))[0] / rows.tokens()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        with torch.no_grad():
            found[kind] = float(module.eval()(heldout, Chance(1, 0, 128))[1]["top1"]) / heldout.tokens()
    assert found["gumbel"] > 0.05 + max(found["none"], found["independent"]), found


def test_a_saved_student_loads_equal_and_a_number_that_cannot_be_predicted_is_refused(tmp_path):
    module = student(EVERYTHING, context="drawn").eval()
    save_student(tmp_path, module, module.own_state(), {}, {})
    ids, g = torch.full((1, L), module.mask_id), torch.randn(L - 1, V)
    ids[0, 0] = 0
    loaded = load_student(tmp_path)
    assert torch.equal(loaded.logits(ids, g), module.logits(ids, g)) and loaded.config.predict == PREDICT
    for number in (0, L):
        with pytest.raises(ValueError, match=rf"student.predict is {number}; it must be in 1..7"):
            student(predict=number)
