"""Every sampler draws from the law that it states, from the stream alone, and reveals every position once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from eval.decoding import choose, restricted_log_probs
from eval.sampler import Decoding, blank_rows, resolve_output, sample, sample_counted, sampling_noise
from eval.schedules import fixed_rank, known_after, reveal_times
from eval.stream import NOISE_DRAW, step_seed
from noise import philox
from tests.eval.known import ROWS, Plan, State, TableLM, TableStudent, fits, law, product
from tests.eval.world import LENGTH, VOCAB, write_student
from trainer.config import NoiseConfig
from trainer.students import load_student

STUDENT = TableStudent()


def drawn(student: TableStudent, decoding: Decoding, rows: int = ROWS, seed: int = 5) -> torch.Tensor:
    ids = sample(student, blank_rows(student, rows, student.unknown + 1, bos=0), torch.arange(rows), seed, decoding)
    return ids[:, 1:]


def masked(state: State) -> list[int]:
    return [position for position, token in enumerate(state) if token == STUDENT.mask_id]


def even(nfe: int, order: str = "random") -> Plan:
    """In step s the row goes from ceil(M s / nfe) known positions to ceil(M (s + 1) / nfe)."""

    def plan(step: int, state: State) -> list[tuple[float, tuple[int, ...]]]:
        count = -(-3 * (step + 1) // nfe) - (3 - len(masked(state)))
        if order == "random":
            groups = list(itertools.combinations(masked(state), count))
            return [(1 / len(groups), group) for group in groups]
        sure = STUDENT.conditionals(torch.tensor([state]))[0].amax(-1)
        places = masked(state) if order == "left_to_right" else sorted(masked(state), key=lambda position: -float(sure[position]))
        return [(1.0, tuple(places[:count]))]

    return plan


def ancestral(steps: int) -> Plan:
    """MDLM: between t = 1 - s / T and the next time each masked position is revealed with probability 1 / (T - s), each alone."""

    def plan(step: int, state: State) -> list[tuple[float, tuple[int, ...]]]:
        hazard, places = 1 / (steps - step), masked(state)
        choices = itertools.product((False, True), repeat=len(places))
        return [
            (hazard ** sum(now) * (1 - hazard) ** (len(now) - sum(now)), tuple(p for p, yes in zip(places, now, strict=True) if yes))
            for now in choices
        ]

    return plan


@pytest.mark.parametrize(
    ("decoding", "steps", "plan"),
    [
        (Decoding(1), 1, even(1)),
        (Decoding(2), 2, even(2)),
        (Decoding(3), 3, even(3)),
        (Decoding(2, order="confidence"), 2, even(2, "confidence")),
        (Decoding(2, order="left_to_right"), 2, even(2, "left_to_right")),
        (Decoding(2, sampler="ancestral"), 2, ancestral(2)),
        (Decoding(5, sampler="ancestral"), 5, ancestral(5)),
        (Decoding(sampler="first_hitting"), 3, even(3)),
    ],
)
def test_a_sampler_draws_from_its_law(decoding: Decoding, steps: int, plan: Plan) -> None:
    assert fits(drawn(STUDENT, decoding), STUDENT, law(STUDENT, steps, plan))


def test_one_token_a_step_samples_the_joint_and_one_step_the_product_of_marginals() -> None:
    marginals = product(STUDENT.marginals(), STUDENT.words)
    assert torch.allclose(law(STUDENT, 3, even(3)), STUDENT.joint) and torch.allclose(law(STUDENT, 1, even(1)), marginals)
    assert fits(drawn(STUDENT, Decoding(3)), STUDENT, STUDENT.joint)
    assert not fits(drawn(STUDENT, Decoding(1)), STUDENT, STUDENT.joint)


def test_a_fine_grid_tends_to_first_hitting_whose_tokens_are_those_of_one_token_a_step() -> None:
    hitting = drawn(STUDENT, Decoding(sampler="first_hitting"), 60)
    assert torch.equal(hitting, drawn(STUDENT, Decoding(3), 60))
    assert torch.equal(hitting, drawn(STUDENT, Decoding(20_000, sampler="ancestral"), 60))


def test_temperature_sharpens_each_marginal_by_its_power() -> None:
    student = TableStudent(unknown=2)
    sharp = student.marginals() ** (1 / 0.5)
    assert fits(drawn(student, Decoding(nfe=1, temperature=0.5)), student, product(sharp / sharp.sum(-1, keepdim=True), student.words))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"nucleus": 0.7}, [0.5, 0, 0.25, 0]), ({"top_k": 3}, [0.5, 0, 0.25, 0.15]), ({"nucleus": 0.8, "top_k": 2}, [0.5, 0, 0.25, 0])],
)
def test_nucleus_and_top_k_keep_the_most_likely_tokens_in_their_proportions(settings: dict, kept: list[float]) -> None:
    p, decoding = torch.tensor([0.5, 0.1, 0.25, 0.15]), Decoding(nfe=1, **settings)
    expected = torch.tensor(kept) / sum(kept)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    token = choose(p.log().expand(4000, 4), uniform, decoding)
    assert torch.bincount(token, minlength=4).tolist() == pytest.approx((4000 * expected).tolist(), abs=1)
    assert torch.allclose(restricted_log_probs(p.log()[None], decoding).softmax(1)[0], expected)


def test_inverse_of_the_distribution_function_is_exact_on_a_grid() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    uniform = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    assert torch.bincount(choose(p.log().expand(800, 6), uniform, Decoding(nfe=1)), minlength=6).tolist() == [0, 400, 0, 200, 200, 0]


def test_argmax_of_a_perfect_readout_is_a_sample_with_noise_held_or_fresh() -> None:
    student = TableStudent(noise="gumbel", readout=True)
    for fresh in (False, True):
        assert fits(drawn(student, Decoding(nfe=3, output="argmax", fresh_noise=fresh)), student, student.joint)


@pytest.mark.parametrize("fresh", [False, True])
def test_noise_is_held_through_all_steps_or_new_in_each_and_scaled_by_its_temperature(fresh: bool) -> None:
    student = TableStudent(noise="gumbel")
    ids_BL = blank_rows(student, 7, 4, bos=0)
    sample(student, ids_BL, torch.arange(7), 9, Decoding(nfe=3, noise_temperature=0.5, fresh_noise=fresh))
    for step, (asked, given_g) in enumerate(zip(student.asked, student.given, strict=True)):
        all_g = torch.zeros(7, 4, 3)
        seed = step_seed(9, step) if fresh else 9
        all_g[ids_BL == student.mask_id] = 0.5 * sampling_noise(seed, torch.arange(7), ids_BL == student.mask_id, 3)
        assert given_g is not None and torch.equal(given_g, all_g[asked == student.mask_id])


def test_fresh_noise_is_prior_noise_that_differs_from_step_to_step_and_changes_nothing_at_one_step() -> None:
    seeds = [step_seed(9, step) for step in range(200)]
    assert seeds[0] == 9 and len(set(seeds)) == 200 and max(seeds) > 2**62
    zero = torch.zeros(1, dtype=torch.int64)
    g = torch.cat([philox.gumbel(philox.rows(seed, zero, zero + 1, NOISE_DRAW), 8) for seed in seeds]).flatten()
    assert stats.kstest(g.numpy(), "gumbel_r").pvalue > 1e-3
    student = TableStudent(noise="gumbel", readout=True)
    held, fresh = (drawn(student, Decoding(1, output="argmax", fresh_noise=fresh), 50) for fresh in (False, True))
    assert torch.equal(held, fresh)


@given(
    st.integers(1, 12),
    st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4),
    st.sampled_from(["even", "ancestral", "first_hitting", "adaptive"]),
    st.sampled_from(["random", "confidence", "left_to_right"]),
)
@example(3, [[True] * 7], "first_hitting", "random")
@example(3, [[True] * 7, [False] * 7], "ancestral", "confidence")
def test_every_position_is_revealed_given_tokens_stay_and_every_forward_is_counted(
    nfe: int, known: list[list[bool]], sampler: str, order: str
) -> None:
    student = TableStudent(vocab_size=2, unknown=7)
    keep = torch.tensor(known)
    ids_BL = blank_rows(student, len(known), 8, bos=1)
    ids_BL[:, 1:][keep] = 1
    unknown_B = (ids_BL == student.mask_id).sum(1)
    own = sampler in ("first_hitting", "adaptive")
    decoding = Decoding(0 if own else nfe, order="random" if own else order, sampler=sampler)  # type: ignore[arg-type]
    lm = TableLM(student) if sampler == "adaptive" else None
    if sampler == "even" and nfe > int(unknown_B.max()):
        with pytest.raises(ValueError, match="lower nfe"):
            sample(student, ids_BL, torch.arange(len(known)), 3, decoding)
        return
    out, nfe_B = sample_counted(student, ids_BL, torch.arange(len(known)), 3, decoding, auxiliary=lm)
    assert not (out == student.mask_id).any()
    assert torch.equal(out[ids_BL != student.mask_id], ids_BL[ids_BL != student.mask_id])
    assert int(nfe_B.sum()) == sum(len(asked) for asked in student.asked)
    assert all((asked == student.mask_id).any(1).all() for asked in student.asked)
    if sampler in ("even", "first_hitting"):
        assert torch.equal(nfe_B, unknown_B if own else unknown_B.clamp_max(nfe))
    else:
        assert bool((nfe_B <= (unknown_B if own else unknown_B.clamp_max(nfe))).all()) and torch.equal(nfe_B > 0, unknown_B > 0)


@given(st.integers(1, 40), st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_even_groups_differ_by_one_at_most(nfe: int, unknown: list[int]) -> None:
    unknown_B = torch.tensor(unknown)
    nowhere = torch.empty(0, dtype=torch.int64)
    group_SB = known_after(Decoding(nfe), unknown_B, nowhere, nowhere).diff(dim=0, prepend=torch.zeros(1, len(unknown), dtype=torch.int64))
    assert torch.equal(group_SB.sum(0), unknown_B)
    assert bool(((group_SB >= unknown_B // nfe) & (group_SB <= -(-unknown_B // nfe))).all())


def test_ancestral_sampling_makes_the_forwards_that_its_formula_says() -> None:
    student, steps = TableStudent(vocab_size=2, unknown=7), 10
    _, nfe_B = sample_counted(student, blank_rows(student, 4000, 8, 0), torch.arange(4000), 1, Decoding(steps, sampler="ancestral"))
    assert float(nfe_B.float().mean()) == pytest.approx(steps * (1 - (1 - 1 / steps) ** 7), abs=4 * float(nfe_B.float().std()) / 4000**0.5)
    assert sum(len(asked) for asked in student.asked) == int(nfe_B.sum())


def test_confidence_reveals_the_surest_position_first() -> None:
    student = TableStudent(unknown=3)
    sure = student.marginals().amax(-1).argmax()
    sample(student, blank_rows(student, 4, 4, bos=0), torch.arange(4), 1, Decoding(nfe=3, order="confidence"))
    assert ((student.asked[1][:, 1:] != student.mask_id).nonzero()[:, 1] == sure).all()


def test_order_is_a_uniform_permutation_of_each_row() -> None:
    row_M, position_M = torch.ones(6000, 3).nonzero(as_tuple=True)
    rank_M = fixed_rank("random", reveal_times(11, row_M, position_M), row_M)
    assert rank_M is not None
    rank = rank_M.view(6000, 3)
    assert torch.equal(rank.sort(1).values, torch.arange(3).expand(6000, 3))
    counts = torch.bincount((rank * torch.tensor([9, 3, 1])).sum(1)).numpy()
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3 and (counts > 0).sum() == 6


NOISES = [
    NoiseConfig(),
    NoiseConfig("gumbel", "add", readout=True, drafts=[1]),
    NoiseConfig("independent", "replace"),
    NoiseConfig("uniform", "replace", readout=True),
    NoiseConfig("gaussian", "add"),
]


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.kind)
@pytest.mark.parametrize("settings", [{"nfe": 3}, {"nfe": 9, "sampler": "ancestral"}, {"sampler": "first_hitting"}, {"sampler": "adaptive"}])
def test_a_seed_names_a_sample_at_any_batch_size(tmp_path: Path, noise: NoiseConfig, settings: dict) -> None:
    write_student(tmp_path / "student", noise=noise)
    student = load_student(tmp_path / "student")
    decoding = Decoding(output=resolve_output("auto", student), fresh_noise=noise.kind == "gaussian", **settings)
    other = Bigram() if decoding.sampler == "adaptive" else None

    def rows(ids: torch.Tensor, seed: int = 1) -> torch.Tensor:
        filled, nfe_B = sample_counted(student, blank_rows(student, len(ids), LENGTH, bos=0), ids, seed, decoding, auxiliary=other)
        return torch.cat([filled, nfe_B[:, None]], 1)

    whole = rows(torch.arange(10))
    assert int(whole.max()) < VOCAB
    assert torch.equal(whole, torch.cat([rows(torch.arange(10)[part]) for part in (slice(0, 1), slice(1, 4), slice(4, 10))]))
    assert torch.equal(whole[[7, 2]], rows(torch.tensor([7, 2])))
    assert not torch.equal(whole, rows(torch.arange(10), seed=2))


class Bigram:
    """A small causal LM that looks at one token."""

    vocab_size = VOCAB

    def logits_of(self, ids_BL: torch.Tensor, where_N: torch.Tensor) -> torch.Tensor:
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
        return table[ids_BL.flatten()[where_N - 1]]


def test_padded_rows_are_filled_as_they_are_alone(tmp_path: Path) -> None:
    write_student(tmp_path / "student")
    student = load_student(tmp_path / "student")
    length_B = torch.tensor([8, 5, 3, 8])
    ids_BL = blank_rows(student, 4, LENGTH, bos=0).masked_fill(torch.arange(LENGTH) >= length_B[:, None], 0)
    out, nfe_B = sample_counted(student, ids_BL, torch.arange(4), 1, Decoding(4), length_B=length_B)
    assert nfe_B.tolist() == [4, 4, 2, 4]
    for row, length in enumerate(length_B.tolist()):
        alone = sample(student, ids_BL[row : row + 1, :length], torch.tensor([row]), 1, Decoding(min(4, length - 1)))
        assert torch.equal(out[row, :length], alone[0]) and not out[row, length:].any()


def test_noise_decides_the_argmax_of_a_readout() -> None:
    assert resolve_output("auto", TableStudent(noise="gumbel", readout=True)) == "argmax"
    assert resolve_output("auto", TableStudent(noise="gumbel")) == "sample"
    assert resolve_output("sample", TableStudent(noise="gumbel", readout=True)) == "sample"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nfe": 0}, "nfe is 0"),
        ({"temperature": 0.0}, r"for temperature 0 set output .* to argmax"),
        ({"noise_temperature": -1.0}, "noise_temperature is -1"),
        ({"nucleus": 0.0}, "nucleus is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"output": "best"}, "output is 'best'"),
        ({"sampler": "even odd"}, "sampler is 'even odd'"),
        ({"output": "argmax", "temperature": 0.9}, "do nothing to an argmax"),
        ({"output": "argmax", "top_k": 4}, "do nothing to an argmax"),
        ({"sampler": "first_hitting"}, "its own order and number of forwards"),
        ({"sampler": "adaptive", "nfe": 0, "order": "confidence"}, "its own order and number of forwards"),
        ({"sampler": "adaptive", "nfe": 0, "student_weight": 1.5}, "student_weight is 1.5"),
        ({"student_weight": 0.7}, "has no second model"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Decoding(nfe=2), **change)


@pytest.mark.parametrize(
    ("decoding", "noise", "given_g", "other", "message"),
    [
        (Decoding(1, noise_temperature=0.9), "none", False, False, "takes no noise"),
        (Decoding(1, fresh_noise=True), "none", False, False, "takes no noise"),
        (Decoding(1, fresh_noise=True), "gumbel", True, False, "noise is given"),
        (Decoding(sampler="adaptive"), "none", False, False, "adaptive without a small causal LM"),
        (Decoding(1), "none", False, True, "even with a small causal LM"),
    ],
)
def test_what_the_student_would_ignore_is_refused(decoding: Decoding, noise: str, given_g: bool, other: bool, message: str) -> None:
    student = TableStudent(noise=noise)
    g_MV = torch.zeros(3, 3) if given_g else None
    with pytest.raises(ValueError, match=message):
        sample(student, blank_rows(student, 1, 4, 0), torch.arange(1), 1, decoding, g_MV, auxiliary=TableLM(student) if other else None)


def test_settings_that_came_later_do_not_rename_sets_that_do_not_use_them() -> None:
    assert Decoding(4).request() == {
        "nfe": 4, "temperature": 1.0, "noise_temperature": 1.0, "nucleus": 1.0, "output": "sample", "order": "random",
    }  # fmt: skip
    assert Decoding(4, sampler="ancestral", top_k=3).request().keys() - Decoding(4).request().keys() == {"sampler", "top_k"}
