"""Options of the noise: other marginals of the same coupling, projections of low rank, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats

from eval.sampler import Decoding, blank_rows, sample, sampling_noise
from noise import philox
from noise.decode import Noise
from tests.trainer.chain import write_chain
from trainer import streamed
from trainer.batch import Batch
from trainer.chance import Chance
from trainer.config import MedusaConfig, NoiseConfig, StudentConfig
from trainer.data import NoiseDataset
from trainer.marginal import Mapped, gaussian, seen, tempered
from trainer.students import build
from trainer.students.mdlm import MDLM

V, L, H = 13, 8, 16
ALL = NoiseConfig(kind="gaussian", input="add", projection="low_rank", rank=3, prior="unigram", readout=True, drafts=[1])
OPTIONS = {
    "gaussian": NoiseConfig(kind="gaussian", input="replace"),
    "uniform": NoiseConfig(kind="uniform", input="replace"),
    "low rank": NoiseConfig(kind="gumbel", input="replace", projection="low_rank", rank=3),
    "all, gaussian": ALL,
    "all, uniform": replace(ALL, kind="uniform"),
}


def student_of(noise: NoiseConfig) -> MDLM:
    torch.manual_seed(0)
    student = build(StudentConfig(layers=2, hidden=H, heads=2, noise=noise), V, L)
    assert isinstance(student, MDLM)
    if student.input is not None and noise.prior == "unigram":
        student.input.log_unigram_V.copy_(torch.randn(V).log_softmax(0))
    return student


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return NoiseDataset(write_chain(tmp_path_factory.mktemp("chain") / "dataset", ragged=True)).batch(np.arange(64))


def test_gaussian_noise_is_exact_in_both_tails() -> None:
    a = np.geomspace(1e-30, 1e3, 20_001)
    expected = np.where(a < math.log(2), -special.ndtri_exp(np.log(-np.expm1(-a))), special.ndtri_exp(-a))
    g = torch.from_numpy(-np.log(a))
    assert np.allclose(gaussian(g).numpy(), expected, rtol=1e-13, atol=1e-15)
    single = gaussian(g.float()).numpy()
    assert np.allclose(single, expected, rtol=1e-6, atol=1e-6) and (np.diff(single) <= 0).all()


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_no_noise_that_a_dataset_can_hold_becomes_infinite(kind: str) -> None:
    g = torch.tensor([-80.0, -3.5, 0.0, 16.0, 23.0, 90.0, 104.0, 400.0, 3000.0])  # a log-prob of -3000 at the end
    z = seen(g, kind)
    assert z.isfinite().all() and (z.diff() >= 0).all() and z.dtype == torch.float32


@pytest.mark.parametrize(("kind", "law"), [("gaussian", stats.norm.cdf), ("uniform", stats.uniform.cdf)])
def test_the_streams_prior_is_seen_with_the_marginal_that_was_asked_for(kind: str, law: object) -> None:
    g = philox.gumbel(philox.rows(5, torch.arange(200), torch.arange(200)), 500).flatten()
    assert stats.kstest(seen(g, kind).double().numpy(), law).pvalue > 1e-3
    assert torch.equal(seen(g, kind).argmax(), g.argmax())


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "gumbel"])
def test_noise_temperature_scales_what_the_student_sees(kind: str) -> None:
    g = torch.linspace(-3, 25, 400, dtype=torch.float64)
    torch.testing.assert_close(seen(tempered(g, kind, 0.85), kind), 0.85 * seen(g, kind), rtol=1e-12, atol=1e-12)
    assert tempered(g, kind, 1.0) is g
    if kind == "gaussian":
        torch.testing.assert_close(seen(tempered(g.float(), kind, 4.0), kind), 4 * seen(g.float(), kind), rtol=1e-5, atol=1e-5)
    if kind == "uniform":
        with pytest.raises(ValueError, match=r"noise_temperature is 1\.3"):
            tempered(g, kind, 1.3)


@pytest.mark.parametrize("name", OPTIONS)
def test_training_and_probe_read_the_datasets_noise_through_the_marginal(batch: Batch, name: str) -> None:
    noise = OPTIONS[name]
    student, twin = student_of(noise), student_of(replace(noise, kind="gumbel"))
    where_N = batch.valid_BL.flatten().nonzero()[:, 0]
    ids_BL = batch.input_ids_BL.masked_fill(batch.valid_BL, V)
    given, drafts = student.predict(ids_BL, batch.lazy_noise_at(where_N), batch.length_B)
    expected, theirs = twin.predict(ids_BL, seen(batch.noise_at(where_N), noise.kind), batch.length_B)
    for ours, other in zip([given, *drafts], [expected, *theirs], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    chance = Chance(3, 5, 64)
    own, others = student(batch, chance)[0], student(batch, chance, replace(batch, seed_B=batch.seed_B + 1))[0]
    assert not torch.isclose(own, others, rtol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
@pytest.mark.parametrize("settings", [{"kind": "bd3lm", "block_size": 4}, {"kind": "mtp", "predict": 3}], ids=["bd3lm", "mtp"])
def test_other_students_train_on_the_marginal_too(batch: Batch, kind: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found, lazy = [], Batch.lazy_noise_at
    for seen_as in (kind, "gumbel"):
        torch.manual_seed(0)
        noise = replace(OPTIONS["low rank"], kind=seen_as, drafts=[1], readout=True)
        student = build(StudentConfig(layers=2, hidden=H, heads=2, noise=noise, **settings), V, L)
        found.append(student(batch, Chance(3, 5, 64))[0].detach())
        # the twin is handed the image of the noise, which Gumbel students take as it is
        monkeypatch.setattr(Batch, "lazy_noise_at", lambda batch, where_N: Mapped.of(lazy(batch, where_N), kind))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
@pytest.mark.parametrize("temperature", [1.0, 0.85])
def test_sampling_gives_the_scaled_marginal_of_the_streams_noise(kind: str, temperature: float) -> None:
    noise = NoiseConfig(kind=kind, input="replace", readout=True)  # type: ignore[arg-type]
    student, twin = student_of(noise).eval(), student_of(replace(noise, kind="gumbel")).eval()
    ids_BL, number_B = blank_rows(student, 16, L, 0), torch.arange(16)
    g_MV = sampling_noise(9, number_B, ids_BL == V, V)
    found = sample(student, ids_BL, number_B, 9, Decoding(2, noise_temperature=temperature, output="argmax"))
    expected = sample(twin, ids_BL, number_B, 9, Decoding(2, output="argmax"), temperature * seen(g_MV, kind))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_all_its_weights_and_streams_to_the_same_gradients(batch: Batch, name: str) -> None:
    results = []
    for stream in (False, True) if OPTIONS[name].readout else (False,):
        student = student_of(replace(OPTIONS[name], stream=stream))
        loss = student(batch, Chance(3, 5, 64))[0]
        loss.backward()
        gradients = [parameter.grad for parameter in student.parameters()]
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
        results.append([loss.detach(), *gradients])
    for made, passing in zip(results[0], results[-1], strict=True):
        torch.testing.assert_close(made, passing, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_mapped_noise_passes_by_in_chunks_as_it_is_made_whole(kind: str) -> None:
    entries, rows_N5 = 1501, philox.rows(3, torch.arange(5), torch.arange(5))
    g = Noise(rows_N5, entries, torch.tensor([0, 4]), torch.tensor([7, 1500]), torch.tensor([70.0, -2.0]))
    mapped = Mapped.of(g, kind)
    assert torch.equal(mapped.dense(), seen(g.dense(), kind))
    torch.testing.assert_close(torch.cat([z_NC for _, z_NC in mapped.chunks(256)], 1), mapped.dense())
    weight_VH = torch.randn(entries, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(streamed.project(mapped, weight_VH), mapped.dense().softmax(1) @ weight_VH, rtol=1e-4, atol=1e-5)


def test_a_projection_of_low_rank_has_rank_times_v_plus_h_weights_and_starts_as_large_as_an_own_one() -> None:
    count = {name: sum(p.numel() for p in student_of(noise).parameters()) for name, noise in {"none": NoiseConfig(), **OPTIONS}.items()}
    assert count["low rank"] - count["none"] == 3 * (V + H) and count["gaussian"] - count["none"] == V * H
    torch.manual_seed(1)
    student = build(StudentConfig(layers=1, hidden=128, heads=2, noise=replace(OPTIONS["low rank"], rank=32)), 2000, L)
    assert isinstance(student, MDLM) and student.input is not None and student.input.widen is not None and student.input.projection is not None
    assert float((student.input.widen.weight @ student.input.projection.weight).detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (NoiseConfig(kind="gumbel", input="replace", projection="low_rank"), "low_rank needs a rank"),
        (NoiseConfig(kind="gumbel", input="replace", rank=4), "rank is 4 and student.noise.projection own"),
        (NoiseConfig(kind="gumbel", input="replace", projection="low_rank", rank=H), f"rank is {H}, but the student is {H} wide"),
        (NoiseConfig(kind="gumbel", readout=True, projection="low_rank", rank=2), r"projection \(low_rank\), .* would be ignored"),
        (NoiseConfig(kind="gaussian", draft_restart=True), "kind is gaussian, but no input, readout or draft uses it"),
        (NoiseConfig(kind="gumbel", input="replace", draft_weight=0.5), "draft_weight is 0.5, but student.noise.drafts names no layer"),
        (NoiseConfig(drafts=[1], draft_weight=-1.0), "draft_weight is -1.0"),
        (NoiseConfig(drafts=[1], stream=True), r"stream \(True\) would be ignored"),
        (NoiseConfig(kind="uniform", input="replace", stream=True), "stream is set, but no readout or draft"),
    ],
)
def test_options_that_would_be_ignored_are_refused_by_name(noise: NoiseConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student_of(noise)


CHOSEN = {"projection": "tied", "prior": "unigram", "readout": True}


@pytest.mark.parametrize(
    ("student", "parts"),
    [
        ({"kind": "mdlm", "layers": 6}, {"input": "add", "drafts": [3], "draft_restart": True, **CHOSEN}),
        ({"kind": "mdlm", "layers": 5}, {"input": "add", "drafts": [2], "draft_restart": True, **CHOSEN}),
        ({"kind": "mdlm", "layers": 1}, {"input": "add", **CHOSEN}),
        ({"kind": "bd3lm", "layers": 12, "block_size": 4}, {"input": "replace", "drafts": [6], "draft_restart": True, **CHOSEN}),
        ({"kind": "mtp", "layers": 4, "predict": 2}, {"input": "replace", "drafts": [2], "draft_restart": True, **CHOSEN}),
        ({"kind": "medusa", "medusa": MedusaConfig(heads_count=3)}, {"input": "replace", "drafts": [1, 2, 3], **CHOSEN}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if "kind" in value else "",
)
@pytest.mark.parametrize("kind", ["gumbel", "independent", "gaussian"])
def test_a_kind_of_noise_alone_is_all_parts(kind: Any, student: dict[str, Any], parts: dict[str, Any]) -> None:
    assert StudentConfig(**student, noise=NoiseConfig(kind, stream=True)).noise == NoiseConfig(kind, stream=True, **parts)


@pytest.mark.parametrize("named", [{"input": "replace"}, {"readout": True}, {"drafts": [1]}], ids=str)
def test_a_part_that_is_named_is_the_only_one(named: dict[str, Any]) -> None:
    noise = NoiseConfig("gumbel", **named)
    assert StudentConfig(noise=noise).noise == noise
    assert StudentConfig(noise=NoiseConfig()).noise == NoiseConfig(), "and no noise stays none"


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_a_dataset_without_noise_is_refused_for_every_kind_that_reads_it(tmp_path: Path, kind: str) -> None:
    from trainer.config import DataConfig, TrainConfig
    from trainer.loop import train

    tokens = write_chain(tmp_path / "tokens", extraction="none")
    noise = NoiseConfig(kind=kind, input="replace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has tokens but no noise"):
        train(TrainConfig(str(tmp_path / "out"), DataConfig(path=str(tokens)), StudentConfig(layers=1, hidden=16, heads=2, noise=noise)))
