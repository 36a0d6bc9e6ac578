"""The exactly known teacher: what it promises, and that the comparison of its students is fair, complete and repeatable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.__main__ import main, parse
from eval.chain import ChainConfig, build, limit_samples
from eval.chain_figures import pair_distance
from eval.chain_page import comparison_table, distance_table, markdown, matched_table, point_table
from eval.exact import write_dataset
from eval.markov import ExactMarginals, MarkovTeacher
from eval.metrics import agreement
from eval.sampler import Decoding, blank_rows, sample
from noise.posterior import posterior_gumbel
from noise.storage import DatasetError
from trainer.config import NoiseConfig, OptimConfig, StudentConfig
from trainer.data import NoiseDataset

TEACHER = MarkovTeacher(states=9, successors=3, seed=4)
SYSTEMS = {
    "none": NoiseConfig(),
    "independent": NoiseConfig(kind="independent", input="replace"),
    "drafts": NoiseConfig(kind="gumbel", input="replace", readout=True, drafts=[1]),
}


def tiny(folder: Path, **settings: object) -> ChainConfig:
    return ChainConfig(
        **{  # type: ignore[arg-type]
            "output": str(folder), "systems": dict(SYSTEMS), "against": {"drafts": ["none", "independent"]}, "chain": TEACHER,
            "length": 6, "rows": 200, "heldout_rows": 20, "model": StudentConfig(layers=2, hidden=16, heads=2),
            "optim": OptimConfig(steps=6, global_batch=16, warmup=2), "nfe": [1, 3], "noise_temperatures": [1.0, 1.3],
            "sequences": 60, "replicates": 50, "workers": 1, **settings,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    config = tiny(tmp_path_factory.mktemp("chain"))
    return config, build(config)


def test_every_state_has_its_successors_and_nothing_returns_to_bos():
    p_VV = TEACHER.transition
    assert torch.allclose(p_VV.sum(1), torch.ones(10, dtype=torch.float64))
    assert ((p_VV[1:] > 0).sum(1) == 3).all() and (p_VV[:, 0] == 0).all()


def test_every_position_has_the_same_distribution():
    p_VV = TEACHER.transition
    assert torch.allclose(p_VV[0] @ p_VV, p_VV[0], atol=1e-12)
    assert torch.allclose(TEACHER.joint.sum(0), p_VV[0]) and TEACHER.entropy_rate < TEACHER.entropy


def test_texts_and_rollouts_are_samples_of_the_chain():
    texts_SL = TEACHER.texts(4000, 6, seed=1).numpy()
    rollouts_SL = TEACHER.rollout(torch.arange(4000), 6, seed=1).numpy()
    for ids_SL in (texts_SL, rollouts_SL):
        assert (TEACHER.transition.numpy()[ids_SL[:, :-1], ids_SL[:, 1:]] > 0).all()
        assert pair_distance(ids_SL, TEACHER.joint.numpy())[0] < 0.03
    assert (texts_SL != rollouts_SL).any(1).mean() > 0.9


def test_a_dataset_of_the_chain_holds_noise_that_chooses_its_text(tmp_path):
    write_dataset(tmp_path, TEACHER, 70, 6, text_seed=1)
    dataset = NoiseDataset(tmp_path)
    batch = dataset.batch(np.arange(70))
    where_N = batch.valid_BL.flatten().nonzero()[:, 0]
    token_N, last_N = batch.input_ids_BL.flatten()[where_N], batch.input_ids_BL.flatten()[where_N - 1]
    g_NV = batch.noise_at(where_N)
    assert ((TEACHER.log_p[last_N] + g_NV).argmax(1) == token_N).all()
    from noise import philox

    rows_N5 = philox.rows(int(dataset.manifest.identity["seed"]), batch.sequence_id_B[where_N // 6], where_N % 6)
    assert (g_NV - posterior_gumbel(TEACHER.log_p[last_N], token_N, rows_N5)).abs().max() <= 0.125 + 1e-5


def test_a_dataset_of_another_chain_is_refused(tmp_path):
    root = write_dataset(tmp_path, TEACHER, 20, 6, text_seed=1).root_hash
    assert write_dataset(tmp_path, TEACHER, 20, 6, text_seed=1).root_hash == root
    with pytest.raises(DatasetError, match=r"teacher\.successors: 4 here, 3 there"):
        write_dataset(tmp_path, replace(TEACHER, successors=4), 20, 6, text_seed=1)


class Perfect:
    """A student that knows the chain: its logits are log p + g where the token before is known."""

    vocab_size, mask_id, ahead, noise = 10, 10, 0, NoiseConfig(kind="gumbel", readout=True)

    def logits(self, ids_BL, g_NV):
        where_N = (ids_BL.flatten() == self.mask_id).nonzero()[:, 0]
        last_N = ids_BL.flatten()[where_N - 1]
        known_N1 = (last_N < self.vocab_size)[:, None]
        return g_NV + torch.where(known_N1, TEACHER.log_p[last_N.clamp_max(self.vocab_size - 1)], TEACHER.log_p[0])


def test_a_perfect_student_begins_as_the_teachers_rollout_from_the_same_noise():
    sequence_id_B = torch.arange(50)
    ids_BL = sample(Perfect(), blank_rows(Perfect(), 50, 6, 0), sequence_id_B, 7, Decoding(1, output="argmax"))
    rollout_BL = TEACHER.rollout(sequence_id_B, 6, 7)
    assert (ids_BL[:, 1] == rollout_BL[:, 1]).all()
    assert agreement(ids_BL.numpy(), rollout_BL.numpy())[1] >= 1


def test_distance_of_pairs_is_zero_for_the_joint_itself_and_one_for_impossible_pairs():
    joint_VV = np.array([[0, 0, 0], [0, 0.5, 0.5], [0, 0, 0]])
    assert pair_distance(np.array([[0, 1, 1], [0, 1, 2]]), joint_VV) == 0
    assert pair_distance(np.array([[0, 2, 1], [0, 2, 2]]), joint_VV) == 1


def test_the_report_has_every_system_output_and_nfe(built):
    _, report = built
    outputs = {name: sorted(system["outputs"]) for name, system in report["systems"].items()}
    assert outputs == {"none": ["sample"], "independent": ["sample"], "drafts": ["argmax", "sample"]}
    for system in report["systems"].values():
        for output, by_nfe in system["outputs"].items():
            assert list(by_nfe) == ["1", "3"]
            for at in by_nfe.values():
                assert len(at["points"]) == (2 if output == "argmax" else 1)
                for point in at["points"]:
                    assert 0 <= point["valid"]["low"] <= point["valid"]["value"] <= point["valid"]["high"] <= 1
    assert {(line["against"], line["nfe"], line["output"]) for line in report["comparisons"]} == {
        (against, nfe, output) for against in ("none", "independent", "limit") for nfe in (1, 3) for output in ("sample", "argmax")
    }


def test_the_teacher_is_valid_and_follows_itself_to_the_end(built):
    config, report = built
    teacher = report["references"]["teacher"][str(config.length)]
    assert teacher["valid"]["value"] == pytest.approx(1) and teacher["rollout_prefix"]["value"] == pytest.approx(config.length)


def test_exact_marginals_are_the_chains_own_given_both_neighbours():
    limit, p_VV = ExactMarginals(TEACHER, 6), TEACHER.transition
    ids_BL = TEACHER.texts(20, 6, seed=2)
    between_BV = torch.zeros(20, 10, dtype=torch.float64)  # by enumeration of the two tokens that are missing
    for first in range(10):
        between_BV[:, first] = (p_VV[ids_BL[:, 1], first][:, None] * p_VV[first] * p_VV[:, ids_BL[:, 4]].T).sum(1)
    ids_BL[:, 2:4] = limit.mask_id
    given_BV = limit.logits(ids_BL, None)[::2].double().softmax(1)
    assert torch.allclose(given_BV, between_BV / between_BV.sum(1, keepdim=True), atol=1e-6)


def test_exact_marginals_one_token_at_a_time_are_the_chain(tmp_path):
    config = tiny(tmp_path, sequences=3000)
    distance = [pair_distance(limit_samples(config, nfe), TEACHER.joint.numpy())[0] for nfe in (1, 2, 6)]
    assert distance[0] > distance[1] > distance[2] and distance[2] < 0.03


def test_exact_marginals_answer_where_what_is_known_contradicts_itself():
    limit = ExactMarginals(TEACHER, 4)
    first, second = next((a, b) for a in range(1, 10) for b in range(1, 10) if not (TEACHER.transition @ TEACHER.transition)[a, b])
    logits_NV = limit.logits(torch.tensor([[0, first, limit.mask_id, second]]), None)
    assert torch.allclose(logits_NV.double().exp()[0], TEACHER.transition[first], atol=1e-6)


def test_students_differ_in_their_noise_alone(built):
    config, _ = built
    recipes = [json.loads((config.folder / "students" / name / "student.json").read_text())["recipe"] for name in SYSTEMS]
    for recipe in recipes:
        recipe["student"].pop("noise")
    assert recipes[0] == recipes[1] == recipes[2]


def test_running_again_draws_nothing_and_gives_the_same_report(built, monkeypatch):
    config, report = built
    monkeypatch.setattr("eval.taught.draw_rows", None)
    monkeypatch.setattr("trainer.loop._Run", None)
    assert build(config) == report


def test_two_workers_make_the_same_report(built, tmp_path):
    _, report = built
    config = tiny(tmp_path, workers=2, device="cpu")
    program = "from tests.eval.test_chain import *; import sys; sys.exit(again(sys.argv[1], sys.argv[2]))"
    (tmp_path / "expected.json").write_text(json.dumps(report))
    done = subprocess.run([sys.executable, "-c", program, config.output, str(tmp_path / "expected.json")], env={**os.environ}, check=False)
    assert done.returncode == 0


def again(output: str, expected: str) -> int:
    """For the test above: worker processes import the main module, which must not be pytest's."""
    report = json.loads(json.dumps(build(tiny(Path(output), workers=2, device="cpu"))))
    there = json.loads(Path(expected).read_text())
    return int(any(report[name] != there[name] for name in ("truth", "references", "systems", "comparisons")))


def test_tables_show_what_the_report_holds(built):
    _, report = built
    head, rows = matched_table(report)
    assert head == ["system", "output", "NFE 1", "NFE 3"] and [row[:2] for row in rows][-1] == ["drafts", "argmax"]
    for head, rows in (table(report) for table in (matched_table, distance_table, comparison_table, point_table)):
        assert rows and all(len(row) == len(head) for row in rows)
    assert "| teacher |" in markdown(report)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against": {"drafts": ["nobody"]}}, "nobody"),
        ({"nfe": [1, 7]}, "length 6"),
        ({"model": StudentConfig(noise=NoiseConfig(kind="gumbel"))}, "own noise"),
        ({"sequences": 1}, "sequences is 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **settings)


def test_a_kind_of_noise_alone_is_all_parts_here_too(tmp_path):
    config = tiny(tmp_path, systems={"none": NoiseConfig(), "all": NoiseConfig("gumbel")}, against={})
    noise = config.systems["all"]
    assert (noise.input, noise.projection, noise.prior, noise.readout, noise.drafts) == ("add", "tied", "unigram", True, [1])
    assert config.systems["none"] == NoiseConfig()


def test_the_recipes_parse_and_the_first_shows_its_control():
    assert parse(["chain", "--config", "recipes/demo_chain_converged.yaml"])[1].optim.steps == 12_000
    command, config = parse(["chain", "--config", "recipes/demo_chain.yaml", "--optim.steps", "7"])
    assert command == "chain" and config.optim.steps == 7 and config.sequences >= 1000
    for name, others in config.against.items():
        assert config.systems[name].kind == "gumbel" and {config.systems[other].kind for other in others} & {"none", "independent"}
        assert {config.systems[other].drafts == config.systems[name].drafts for other in others} == {True}


def test_a_chain_that_cannot_be_ends_with_one_line(tmp_path, capsys):
    arguments = ["chain", "--output", str(tmp_path), "--systems", "{none: {kind: none}}", "--chain.states", "3", "--chain.successors", "5"]
    with pytest.raises((SystemExit, ValueError)):
        sys.exit(main(arguments))
    assert "successors is 5" in capsys.readouterr().err
