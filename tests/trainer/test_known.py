"""noise.known: known tokens carry their noise too, in training that of the dataset, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.chain import write_chain
from trainer import flops
from trainer.batch import Batch
from trainer.chance import SMALLEST_TIME, Chance
from trainer.conditioning import KnownNoise
from trainer.config import NoiseConfig, StudentConfig
from trainer.data import NoiseDataset
from trainer.layout import layout
from trainer.marginal import seen
from trainer.students import build
from trainer.students.masked import Masked
from trainer.students.mdlm import MDLM

V, L, H = 13, 8, 16
ALL = NoiseConfig("gumbel", "add", "tied", prior="unigram", readout=True, drafts=[1], draft_restart=True, known=True)
OPTIONS = {"input": NoiseConfig("gumbel", "replace", known=True), "all": ALL, "low rank": replace(ALL, projection="low_rank", rank=3)}


def student_of(noise: NoiseConfig, **more: object) -> Any:
    torch.manual_seed(0)
    return build(StudentConfig(layers=2, hidden=H, heads=2, noise=noise, **more), V, L)  # type: ignore[arg-type]


def scaled(noise: NoiseConfig) -> MDLM:
    """With a scale of known tokens' noise that is not what it starts as."""
    student = student_of(noise)
    assert student.input is not None and student.input.known_scale is not None
    torch.nn.init.normal_(student.input.known_scale)
    return student


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return NoiseDataset(write_chain(tmp_path_factory.mktemp("chain") / "dataset", ragged=True)).batch(np.arange(64))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_known_tokens_noise_stands_beside_its_embedding_through_the_inputs_projection(name: str) -> None:
    student = scaled(OPTIONS[name])
    ids_BL = torch.randint(0, V, (3, L))
    ids_BL[:, 4:6] = V
    g_NV, h_KV, where_K = torch.randn(6, V), torch.randn(3, V), torch.tensor([1, 3 + L, 7 + 2 * L])
    given = student.logits(ids_BL, g_NV, known=KnownNoise(where_K, h_KV))
    table_VH = student.model.embed_tokens.weight
    weight_VH = table_VH[:V] if student.input.projection is None else student.input.projection.weight.T
    added_KH = h_KV.softmax(1) @ weight_VH
    if student.input.widen is not None:
        added_KH = added_KH @ student.input.widen.weight.T
    moved_BLH = torch.zeros(3, L, H)
    moved_BLH.view(-1, H)[where_K] = student.input.known_scale * added_KH
    real = student.model.embed_tokens.forward
    student.model.embed_tokens.forward = lambda ids: real(ids) + moved_BLH  # type: ignore[method-assign]
    torch.testing.assert_close(given, student.logits(ids_BL, g_NV))


def test_a_new_student_does_not_yet_hear_known_tokens(batch: Batch) -> None:
    heard, twin = student_of(ALL), student_of(replace(ALL, known=False))
    assert torch.equal(heard(batch, Chance(3, 5, 64))[0], twin(batch, Chance(3, 5, 64))[0])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["gumbel", "gaussian", "uniform"])
def test_training_gives_every_known_token_the_datasets_own_noise(batch: Batch, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, chance, calls = scaled(replace(OPTIONS[name], kind=kind)), Chance(3, 5, 64), []  # type: ignore[arg-type]
    real = MDLM.predict

    def heard(self: MDLM, ids_BL, g_NV, length_B, known):  # type: ignore[no-untyped-def]
        calls.append((ids_BL, known))
        return real(self, ids_BL, g_NV, length_B, known)

    monkeypatch.setattr(MDLM, "predict", heard)
    loss = student(batch, chance)[0]
    ((ids_BL, known),) = calls
    masked_BL = chance.masked(batch.sequence_id_B, chance.rates(batch.place_B, 1, SMALLEST_TIME, 1.0)[:, 0], L) & batch.valid_BL
    assert torch.equal(ids_BL == V, masked_BL) and 0 < int(masked_BL.sum()) < int(batch.valid_BL.sum())
    position_L = torch.arange(L)
    expected_BL = ~masked_BL & (position_L > 0) & (position_L < batch.length_B[:, None])
    assert torch.equal(known.where_K, expected_BL.flatten().nonzero()[:, 0])
    g_KV = batch.noise_at(known.where_K)
    assert torch.equal(known.g_KV.dense(), g_KV)
    # the marginal is applied to known tokens' noise as to that of masked ones
    monkeypatch.setattr(
        MDLM, "predict", lambda self, ids_BL, g_NV, length_B, known: real(self, ids_BL, g_NV, length_B, KnownNoise(known.where_K, g_KV))
    )
    torch.testing.assert_close(student(batch, chance)[0], loss)
    if kind != "gumbel":
        twin = scaled(OPTIONS[name])
        image = KnownNoise(known.where_K, seen(g_KV, kind))
        table_VH = twin.model.embed_tokens.weight[:V]
        x_BLH, place_BL = torch.zeros(*ids_BL.shape, H), position_L.expand_as(ids_BL)
        ours, theirs = (of.input.beside(noise.shown(ids_BL != V, place_BL, L), x_BLH, table_VH) for of, noise in ((student, known), (twin, image)))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_control_and_the_probe_never_hear_the_rows_own_noise(batch: Batch) -> None:
    control = scaled(replace(ALL, kind="independent"))
    other = replace(batch, seed_B=batch.seed_B + 1)
    assert torch.equal(control(batch, Chance(3, 5, 64))[0], control(other, Chance(3, 5, 64))[0])
    student = scaled(OPTIONS["input"])
    where_K = batch.valid_BL.flatten().nonzero()[:, 0]
    own = student._known(batch, Chance(3, 5, 64), batch.valid_BL, None)
    probe = student._known(batch, Chance(3, 5, 64), batch.valid_BL, other)
    assert own is not None and probe is not None and torch.equal(own.where_K, where_K) and not torch.equal(own.g_KV.dense(), probe.g_KV.dense())


def test_the_probe_hears_another_rows_noise_alone(batch: Batch) -> None:
    student, chance, other = scaled(OPTIONS["all"]), Chance(3, 5, 64), replace(batch, seed_B=batch.seed_B + 1)
    assert torch.equal(student(batch, chance, other)[0], student(other, chance)[0])  # the same text: only its noise is another


def test_prompts_of_text_that_a_teacher_wrote_carry_none(tmp_path: Path) -> None:
    batch = NoiseDataset(write_chain(tmp_path / "dataset", extraction="sequential")).batch(np.arange(16))
    written_BL = (torch.arange(L) > 3).expand(16, L)
    batch = replace(batch, sketch=replace(batch.sketch, log_prob_N=-written_BL.float().flatten()))
    student = scaled(OPTIONS["input"])
    known = student._known(batch, Chance(3, 5, 16), batch.valid_BL, None)
    assert known is not None and known.where_K.remainder(L).unique().tolist() == [4, 5, 6, 7]


def test_every_weight_trains(batch: Batch) -> None:
    student = student_of(ALL)
    student(batch, Chance(3, 5, 64))[0].backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in student.parameters())


def test_it_is_refused_where_it_would_be_ignored() -> None:
    with pytest.raises(ValueError, match=r"known \(True\) would be ignored"):
        student_of(NoiseConfig("gumbel", readout=True, known=True))
    with pytest.raises(ValueError, match=r"student.noise.known is set, which only student.kind mdlm, bd3lm or mtp reads \(kind is medusa\)"):
        StudentConfig("medusa", noise=OPTIONS["input"])


BLOCKS = [{"kind": "bd3lm", "block_size": 3}, {"kind": "bd3lm", "block_size": 4, "shift": True}, {"kind": "bd3lm", "block_size": 1}]


def told(student: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, dict[tuple[int, int], torch.Tensor]]:
    """(the input's tokens int64 [B, M], the noise beside each (row, slot) that has any) of one training forward."""
    calls: list[Any] = []
    real = Masked.through

    def heard(self, ids_BM, where_N, g_NV, rotary, mask, cache=None, known=None):  # type: ignore[no-untyped-def]
        calls.append((ids_BM, known))
        return real(self, ids_BM, where_N, g_NV, rotary, mask, cache, known)

    monkeypatch.setattr(Masked, "through", heard)
    student(batch, Chance(3, 5, 64))
    ((ids_BM, known),) = calls
    g_KV = known.g_KV.dense()
    return ids_BM, {divmod(int(slot), ids_BM.shape[1]): g_KV[of] for slot, of in zip(known.slot_P, known.of_P, strict=True)}


@pytest.mark.parametrize("more", BLOCKS, ids=str)
def test_a_block_student_is_told_of_a_token_wherever_it_stands(batch: Batch, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the noised half where it is not masked, in the clean half always, and where a block begins with the token before it."""
    student = student_of(OPTIONS["input"], **more)
    ids_BM, noise = told(student, batch, monkeypatch)
    position_M = layout(L, more["block_size"], more.get("shift", False), torch.device("cpu")).position_M.tolist()
    expected = {
        (row, slot): position
        for row in range(64)
        for slot, position in enumerate(position_M)
        if bool(batch.valid_BL[row, position]) and int(ids_BM[row, slot]) != V
    }
    assert noise.keys() == expected.keys()
    g_NV = batch.noise_at(torch.tensor([row * L + position for (row, _), position in expected.items()]))
    assert torch.equal(torch.stack([noise[place] for place in expected]), g_NV)


@pytest.mark.parametrize("context", ["row", "drawn"])
def test_a_student_of_several_tokens_is_told_of_those_that_it_does_not_predict(batch: Batch, context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids_BL, noise = told(student_of(OPTIONS["input"], kind="mtp", predict=3, context=context), batch, monkeypatch)
    expected = [tuple(place) for place in (batch.valid_BL & (ids_BL != V)).nonzero().tolist()]
    assert sorted(noise) == expected and expected
    g_NV = batch.noise_at(torch.tensor([row * L + position for row, position in expected]))
    assert torch.equal(torch.stack([noise[place] for place in expected]), g_NV)


def test_where_all_tokens_are_predicted_none_is_known() -> None:
    with pytest.raises(ValueError, match=r"student\.predict is 7: all tokens are predicted"):
        student_of(OPTIONS["input"], kind="mtp", predict=L - 1)


@pytest.mark.parametrize("more", [*BLOCKS, {"kind": "mtp", "predict": 3}], ids=str)
def test_they_do_not_hear_it_at_first_and_every_weight_trains(batch: Batch, more: dict[str, Any]) -> None:
    student, twin = student_of(ALL, **more), student_of(replace(ALL, known=False), **more)
    assert torch.equal(student(batch, Chance(3, 5, 64))[0], twin(batch, Chance(3, 5, 64))[0])
    student(batch, Chance(3, 5, 64))[0].backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in student.parameters())


@pytest.mark.parametrize("more", [{"kind": "bd3lm", "block_size": 3}, {"kind": "mtp", "predict": 3}], ids=str)
def test_a_token_knows_nothing_of_later_noise(batch: Batch, more: dict[str, Any]) -> None:
    """Of the block's own noise, or that of the predicted tokens, and of noise before: the rest moves nothing."""
    torch.manual_seed(5)
    student = student_of(OPTIONS["input"], **more)
    torch.nn.init.normal_(student.input.known_scale)
    ids_1L = torch.randint(0, V, (1, L))
    ids_1L[0, 3:6] = V
    where_K, h_KV = torch.tensor([1, 2, 6, 7]), torch.randn(4, V)
    before, after = (student.logits(ids_1L, torch.ones(3, V), known=KnownNoise(where_K[k], h_KV[k])) for k in (slice(0, 2), slice(0, 4)))
    alone = student.logits(ids_1L, torch.ones(3, V))
    torch.testing.assert_close(before, after)
    assert not torch.allclose(before, alone, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_its_flops_are_torchs_count(name: str) -> None:
    student = student_of(OPTIONS[name])
    ids_BL = torch.zeros(2, L, dtype=torch.int64)
    ids_BL[:, 5:] = V
    known = KnownNoise((ids_BL != V).flatten().nonzero()[:, 0], torch.randn(10, V))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits_NV, drafts = student.predict(ids_BL, torch.randn(6, V), known=known)
        (logits_NV.sum() + sum(draft_NV.sum() for draft_NV in drafts)).backward()
    assert counter.get_total_flops() == 2 * flops.training(student.config, V, L, 3, 5)
