"""The study of known languages: figures are exact against brute force, the comparison is complete, and a second run makes nothing."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.__main__ import main, parse
from eval.decoding import Decoding
from eval.factorised import factorised
from eval.integrated import integrated
from eval.languages import language
from eval.sampler import blank_rows, sample
from eval.study import load_masked
from eval.truth import TruthConfig, build, chances, measured
from eval.truth_figures import figures
from eval.truth_page import comparison_table, figure_table, markdown, one_call_table, show
from trainer.config import NoiseConfig, OptimConfig, StudentConfig

SYSTEMS = {
    "none": NoiseConfig(),
    "independent": NoiseConfig(kind="independent", input="replace"),
    "gumbel": NoiseConfig(kind="gumbel", input="replace"),
}


def tiny(folder: Path, **settings: object) -> TruthConfig:
    return TruthConfig(
        **{  # type: ignore[arg-type]
            "output": str(folder), "systems": dict(SYSTEMS), "against": {"gumbel": ["none", "independent"]}, "languages": ["cities", "maze"],
            "rows": 200, "heldout_rows": 20, "model": StudentConfig(layers=1, hidden=16, heads=2), "optim": OptimConfig(steps=4, global_batch=16),
            "nfe": [1, 3], "sequences": 60, "integration": 320, "seeds": [1, 2], "workers": 1, **settings,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    config = tiny(tmp_path_factory.mktemp("truth"))
    return config, build(config)


def test_the_study_has_every_language_seed_system_and_nfe(built):
    _, truth = built
    assert list(truth["languages"]) == ["cities", "maze"]
    for known in truth["languages"].values():
        assert list(known["seeds"]) == ["1", "2"]
        for found in known["seeds"].values():
            assert list(found["systems"]) == list(SYSTEMS)
            for system in found["systems"].values():
                assert list(system["nfe"]) == ["1", "3"] and 0 <= system["reconstruction"]["value"] <= 1
                assert 0 <= system["accepted"]["value"] <= known["tokens"]
                for at in system["nfe"].values():
                    assert 0 <= at["valid"]["low"] <= at["valid"]["value"] <= at["valid"]["high"] <= 1 + 1e-9
                    assert 0 <= at["distance"]["low"] <= at["distance"]["value"] <= at["distance"]["high"] <= 1
                    assert 1 - at["valid"]["low"] <= at["distance"]["high"] + 1e-9, "what is no sentence is missing elsewhere"
            lines = {(line["system"], line["against"], line["nfe"]) for line in found["comparisons"]}
            assert lines == set(product(["gumbel"], ["none", "independent", "limit"], [1, 3]))


def test_what_a_student_without_noise_writes_is_summed_over_all_orders(built):
    """Against brute force over orders, sentence by sentence, in float64; and against samples of the same student."""
    config, truth = built
    known, student = language("cities"), load_masked(str(config.taught("cities", 1).student("none")), "cpu").double()
    with torch.no_grad():
        student.model.embed_tokens.weight.mul_(8)  # opinions
    expected_M = np.zeros(len(known.p_M))
    for order in permutations(range(4)):
        rows_ML = blank_rows(student, len(known.p_M), 5, 0)
        chance_M = torch.ones(len(known.p_M), dtype=torch.float64)
        for group in ((order[0], order[1]), (order[2],), (order[3],)):
            open_L = [at for at in range(1, 5) if int(rows_ML[0, at]) == student.mask_id]
            with torch.no_grad():
                p_MOV = student.logits(rows_ML).softmax(1).view(len(rows_ML), len(open_L), -1)
            for at in group:
                chance_M *= p_MOV[:, open_L.index(at + 1)].gather(1, torch.from_numpy(known.ids_ML[:, [at]]))[:, 0]
            for at in group:
                rows_ML[:, at + 1] = torch.from_numpy(known.ids_ML[:, at])
        expected_M += chance_M.numpy() / 24
    q_M = factorised(known, 3, functools.partial(chances, student, known, "cpu"))
    assert np.allclose(q_M, expected_M, rtol=1e-9) and q_M.sum() > 1e-4
    ids_SL = sample(student, blank_rows(student, 20_000, 5, 0), torch.arange(20_000), 3, Decoding(3))[:, 1:].numpy()
    seen_M = np.bincount(known.find(ids_SL) + 1, minlength=len(known.p_M) + 1)[1:]
    expected = 20_000 * q_M.sum()
    assert abs(seen_M.sum() - expected) < 4 * expected**0.5
    found = truth["languages"]["cities"]["seeds"]["1"]["systems"]["none"]["nfe"]["3"]
    assert found["valid"]["low"] == found["valid"]["value"] == found["valid"]["high"] > 0


def test_the_summary_is_of_the_seeds(built):
    _, truth = built
    known = truth["languages"]["cities"]
    values = [found["systems"]["none"]["nfe"]["3"]["distance"]["value"] for found in known["seeds"].values()]
    assert known["summary"]["systems"]["none"]["nfe"]["3"]["distance"] == pytest.approx(
        {"mean": np.mean(values), "low": min(values), "high": max(values)}
    )


def test_only_what_is_better_in_every_seed_is_beaten(built):
    config, truth = built
    for known in truth["languages"].values():
        for nfe, at in known["summary"]["systems"]["gumbel"]["nfe"].items():
            for other in ("none", "independent", "limit"):
                lines = [
                    line for found in known["seeds"].values() for line in found["comparisons"] if (str(line["nfe"]), line["against"]) == (nfe, other)
                ]
                assert len(lines) == len(config.seeds)
                assert (other in at["beats"]["valid"]) == all(line["valid"]["low"] > 0 for line in lines)
                assert (other in at["beats"]["distance"]) == all(line["distance"]["high"] < 0 for line in lines)


def test_a_difference_goes_from_the_least_to_the_most_that_two_bounds_allow(built):
    """By hand, of every line: so a star means that the bounds do not meet."""
    _, truth = built
    for known in truth["languages"].values():
        for found in known["seeds"].values():
            for line in found["comparisons"]:
                nfe, figures_of = str(line["nfe"]), found["systems"]
                for figure in ("valid", "distance"):
                    ours = figures_of[line["system"]]["nfe"][nfe][figure]
                    exact = dict.fromkeys(("value", "low", "high"), known["limit"][nfe][figure])
                    theirs = exact if line["against"] == "limit" else figures_of[line["against"]]["nfe"][nfe][figure]
                    by_hand = {"value": ours["value"] - theirs["value"], "low": ours["low"] - theirs["high"], "high": ours["high"] - theirs["low"]}
                    assert line[figure] == pytest.approx(by_hand)


def test_the_integral_is_of_the_seeds_own_draws(built):
    """What is kept is what the same seed integrates again, and another does not."""
    config, _ = built
    known, student = language("cities"), load_masked(str(config.taught("cities", 2).student("gumbel")), "cpu")
    kept_GM = measured(config, "cities", 2, "gumbel").written[3]
    of_seed = [integrated(student, known, Decoding(3), config.integration, seed, "cpu") for seed in (1, 2)]
    assert np.allclose(kept_GM, of_seed[1]) and not np.allclose(kept_GM, of_seed[0])


def test_a_student_without_noise_is_accepted_as_speculative_sampling_says(built):
    config, truth = built
    known, taught = language("cities"), config.taught("cities", 1)
    student = load_masked(str(taught.student("none")), "cpu")
    with torch.inference_mode():
        q_LV = student.logits(blank_rows(student, 1, 5, 0), None).double().softmax(1).numpy()
    expected, chance = 0.0, {(): 1.0}  # chance that a prefix is drafted and accepted, by walking the teacher's tree
    for at in range(4):
        longer: dict[tuple[int, ...], float] = {}
        for prefix, alive in chance.items():
            with_prefix_M = (known.ids_ML[:, :at] == np.array(prefix)).all(1)
            for token in range(known.vocab_size):
                p = known.p_M[with_prefix_M & (known.ids_ML[:, at] == token)].sum() / known.p_M[with_prefix_M].sum()
                if p:
                    longer[*prefix, token] = alive * min(1.0, p / q_LV[at, token]) * q_LV[at, token]
        chance = longer
        expected += sum(chance.values())
    assert truth["languages"]["cities"]["seeds"]["1"]["systems"]["none"]["accepted"]["value"] == pytest.approx(expected)


def test_a_student_that_is_the_teacher_is_accepted_to_the_end(built, monkeypatch):
    config, _ = built
    known = language("cities")

    class Perfect:
        """Writes the teacher's sentence from the teacher's noise, in one call."""

        vocab_size, mask_id, noise, block_length = known.vocab_size, known.vocab_size, NoiseConfig(kind="gumbel", input="replace"), 5

        config, ahead = StudentConfig(), 0

        def logits(self, ids_BL, g_NV):
            g_BLV = g_NV.view(len(ids_BL), 4, -1)
            state_B, found = torch.zeros(len(ids_BL), dtype=torch.int64), []
            for at in range(4):
                token_B = (known.log_p[state_B] + g_BLV[:, at]).argmax(1)
                state_B = known.next_state[state_B, token_B]
                found.append(token_B)
            return 99.0 * torch.nn.functional.one_hot(torch.stack(found, 1).flatten(), known.vocab_size)

    monkeypatch.setattr("eval.truth.load_masked", lambda *_: Perfect())
    monkeypatch.setattr("eval.truth.folder_identity", lambda *_: "perfect")
    found = measured(replace(config, nfe=[1], integration=4000), "cities", 1, "gumbel")
    assert len(found.accepted_S) == 4000 and (found.accepted_S == 4).all()
    written = figures(known, found.written[1])
    assert written["valid"].value == pytest.approx(1) and written["distance"].low == 0 < written["distance"].high < 0.1
    assert found.returned_S.mean() > 0.9  # the shards' noise is within epsilon of the posterior's, so almost every token comes back


def test_running_again_makes_nothing_and_gives_the_same_figures(built, monkeypatch):
    config, truth = built
    for name in ("draw_rows", "integrated", "factorised", "reconstruct", "load_masked"):
        monkeypatch.setattr(f"eval.truth.{name}", None)
    monkeypatch.setattr("trainer.loop._Run", None)
    assert json.dumps(build(config)) == json.dumps(truth)


def test_an_interrupted_study_continues_with_what_is_missing(built, tmp_path, monkeypatch):
    _, truth = built
    smaller = tiny(tmp_path, languages=["cities"], seeds=[1])
    calls = []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return integrated(*arguments)

    monkeypatch.setattr("eval.truth.integrated", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(smaller)
    there = set(tmp_path.rglob("*.arrow"))
    again = build(smaller)
    assert there <= set(tmp_path.rglob("*.arrow"))
    assert again["languages"]["cities"]["seeds"]["1"] == truth["languages"]["cities"]["seeds"]["1"]


def test_tables_and_pictures_show_what_the_study_holds(built, tmp_path, capsys):
    from eval import truth_plot

    config, truth = built
    for head, rows in (figure_table(truth, "valid"), figure_table(truth, "distance"), one_call_table(truth), comparison_table(truth)):
        assert rows and all(len(row) == len(head) for row in rows)
    page = markdown(truth, "why_truth.png")
    assert all(f"| {name} | {system} |" in page for name in ("cities", "maze") for system in SYSTEMS)
    show(truth)
    assert "no noise, exact limit" in capsys.readouterr().out
    pictures = truth_plot.draw(config, truth, tmp_path)
    assert {path.name for path in pictures} == {"why_truth.png", "why_noise.png", "why_cities.png", "why_maze.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 150_000 for path in pictures)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"languages": ["klingon"]}, "klingon.*cities, arithmetic"),
        ({"nfe": [1, 5]}, "a sentence of cities has 4 tokens"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"integration": 127}, "integration is 127; it must be at least 128"),
        ({"against": {"gumbel": ["nobody"]}}, "nobody"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **settings)


def test_the_recipe_parses_and_compares_with_twin_and_control():
    command, config = parse(["truth", "--config", "recipes/demo_truth.yaml", "--optim.steps", "7"])
    assert command == "truth" and config.optim.steps == 7 and config.nfe == [1, 2, 3, 4] and len(config.seeds) >= 3
    assert {config.systems[name].kind for name in config.against["gumbel"]} == {"none", "independent"}


def test_a_language_that_is_none_ends_with_one_line(tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)):
        raise SystemExit(main(["truth", "--output", str(tmp_path), "--systems", "{none: {kind: none}}", "--languages", "[klingon]"]))
    assert "klingon" in capsys.readouterr().err
