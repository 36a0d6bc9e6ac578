"""Likelihoods of continuations: bounds against enumeration, exactness, and noise that knows no answer."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from eval.causal import CausalLM
from eval.likelihood import CausalLikelihood, MaskedLikelihood, masks, sequence_id, windows
from tests.eval.world import write_student
from trainer.config import NoiseConfig, StudentConfig
from trainer.students import build

V, GIVEN = 3, [0, 2]
NOISE = NoiseConfig(kind="gumbel", input="replace", readout=True)


def student(kind: str, noise: NoiseConfig | None = None, **settings: int):
    torch.manual_seed(1)
    built = build(StudentConfig(kind=kind, layers=2, hidden=16, heads=2, noise=noise or NoiseConfig(), **settings), V, 6)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "norm" not in name:
                weight.add_(0.5 * torch.randn_like(weight))
    built = built.eval().requires_grad_(False)
    return built.double() if noise is None else built


def words(length: int) -> list[list[int]]:
    return [[*GIVEN, *word] for word in itertools.product(range(V), repeat=length)]


def conditional(model, ids: list[int], hidden: tuple[int, ...]) -> torch.Tensor:
    """log p at the hidden positions by the sampler's own call, [positions, V]."""
    row = torch.tensor([ids])
    row[0, list(hidden)] = model.mask_id
    return model.logits(row).log_softmax(-1)


def nelbo(model, ids: list[int], positions: tuple[int, ...]) -> float:
    """E over t ~ U(0, 1) of 1/t sum over masked of -log p, by Gauss-Legendre quadrature over t and a sum over all masks: MDLM's own formula."""
    node, weight = (torch.tensor(x, dtype=torch.float64) for x in np.polynomial.legendre.leggauss(12))
    t_T, w_T = (node + 1) / 2, weight / 2
    total = 0.0
    for size in range(1, len(positions) + 1):
        for hidden in itertools.combinations(positions, size):
            loss = -sum(float(row[ids[at]]) for row, at in zip(conditional(model, ids, hidden), hidden, strict=True))
            total += loss * float((w_T * t_T ** (size - 1) * (1 - t_T) ** (len(positions) - size)).sum())
    return total


def all_orders(model, ids: list[int], positions: tuple[int, ...]) -> float:
    """p of the words under the sampler that reveals one position at a time in random order."""
    found = []
    for order in itertools.permutations(positions):
        log_p = 0.0
        for k, at in enumerate(order):
            hidden = tuple(sorted(order[k:]))
            log_p += float(conditional(model, ids, hidden)[hidden.index(at), ids[at]])
        found.append(math.exp(log_p))
    return sum(found) / len(found)


@pytest.mark.parametrize("word", [(1, 0, 2), (2, 2, 1)])
def test_the_mean_over_masks_is_the_exact_bound_and_lies_above_the_exact_likelihood(word: tuple[int, ...]) -> None:
    model, ids, at = student("mdlm"), [*GIVEN, *word], (2, 3, 4)
    exact = nelbo(model, ids, at)
    assert exact > -math.log(all_orders(model, ids, at)) > 0
    hidden = [part for n in (1, 2, 3) for part in itertools.combinations(range(3), n)]
    every_KM = torch.tensor([[place in part for place in range(3)] for part in hidden])
    nll_KM, best_KM = MaskedLikelihood(model, 1, 1).losses(ids, 2, every_KM, torch.zeros(len(hidden), dtype=torch.int64))
    assert all(bool((best_M >= 0).eq(masked_M).all()) for best_M, masked_M in zip(best_KM, every_KM, strict=True))
    n_K = every_KM.sum(1).double()
    p_K = 1 / (3 * torch.tensor([math.comb(3, len(part)) for part in hidden], dtype=torch.float64))  # n uniform, places uniform given n
    loss_K = 3 / n_K * nll_KM.sum(1)
    assert float((p_K * loss_K).sum()) == pytest.approx(exact, abs=1e-9)
    deviation = float((p_K * (loss_K - exact) ** 2).sum() ** 0.5)
    assert abs(-MaskedLikelihood(model, 900, 1)(ids, 2)[0] - exact) < 3 * deviation / 30 < exact / 10


def test_masks_are_uniform_in_number_and_then_in_place_and_weigh_what_they_leave_out() -> None:
    block_M = torch.tensor([0, 0, 0, 1, 1])
    masked_KM, weight_KM = masks(list(range(1, 3001)), 7, 1, block_M)
    for part, size in ((slice(0, 3), 3), (slice(3, 5), 2)):
        n_K = masked_KM[:, part].sum(1)
        assert torch.allclose(weight_KM[:, part] * n_K[:, None], torch.tensor(float(size), dtype=torch.float64))
        assert torch.bincount(n_K).tolist() == [0] + [3000 // size] * size  # each number has its exact share
        expected = [3000 / size / math.comb(size, n) for n in range(1, size + 1) for _ in range(math.comb(size, n))]
        subsets = [where for n in range(1, size + 1) for where in itertools.combinations(range(size), n)]
        counted = [int((masked_KM[:, part] == torch.tensor([k in where for k in range(size)])).all(1).sum()) for where in subsets]
        assert stats.chisquare(counted, expected).pvalue > 1e-3


def test_blocks_are_exact_over_all_orders_and_else_bounds_that_add_up() -> None:
    alone = student("bd3lm", block_size=1)
    score = MaskedLikelihood(alone, 1, 1)
    assert score.exact and sum(math.exp(score(ids, 2)[0]) for ids in words(3)) == pytest.approx(1, abs=1e-9)
    ids = [0, 2, 1, 0, 2]
    assert score(ids, 2)[0] == pytest.approx(sum(float(conditional(alone, ids[: at + 1], (at,))[0, ids[at]]) for at in (2, 3, 4)), abs=1e-9)
    paired = student("bd3lm", block_size=2)
    exact = nelbo(paired, ids[:4], (2, 3)) + nelbo(paired, ids, (4,))
    many = torch.tensor([-MaskedLikelihood(paired, 2, seed)(ids, 2)[0] for seed in range(1, 61)], dtype=torch.float64)
    assert not MaskedLikelihood(paired, 2, 1).exact and MaskedLikelihood(paired, 3, 1).exact
    assert abs(float(many.mean()) - exact) < 3 * float(many.std()) / len(many) ** 0.5


@pytest.mark.parametrize(("size", "given"), [(2, 1), (2, 2), (3, 1), (3, 2), (4, 3)])
def test_all_orders_within_blocks_are_summed(size: int, given: int) -> None:
    """Blocks that the context begins, whole ones, and one that the row's end cuts off."""
    model, ids = student("bd3lm", block_size=size), [0, 2, 1, 0, 2, 1]
    score = MaskedLikelihood(model, 2**size - 1, 1)
    expected = 0.0
    for start in range(0, 6, size):
        stop = min(start + size, 6)
        expected += math.log(all_orders(model, ids[:stop], tuple(range(max(start, given), stop)))) if stop > given else 0
    assert score.exact and score(ids, given)[0] == pytest.approx(expected, abs=1e-9)
    if given == 2:
        assert sum(math.exp(score(word, 2)[0]) for word in words(3)) == pytest.approx(1, abs=1e-9)


def test_all_orders_are_summed_given_noise_and_then_averaged_over_it() -> None:
    """By enumeration: the block's noise is the same in every order of a draw, and blocks are averaged apart."""
    model, ids = student("bd3lm", NOISE, block_size=2), [0, 2, 1, 0, 2]
    score = MaskedLikelihood(model, 3, 1)
    assert not score.exact and "3 draws of prior noise" in score.about
    total = 0.0
    for block in ((2, 3), (4,)):
        chances = []
        for draw in range(3):
            position_N = torch.tensor(block)
            g_NV = score._noise(torch.full_like(position_N, draw), position_N, sequence_id(ids[:2]))
            found = 0.0
            for order in itertools.permutations(range(len(block))):
                log_p = 0.0
                for k, place in enumerate(order):
                    hidden = sorted(order[k:])
                    row = torch.tensor([ids[: block[-1] + 1]])
                    row[0, position_N[hidden]] = model.mask_id
                    log_p += float(model.logits(row, g_NV[hidden]).log_softmax(-1)[hidden.index(place), ids[block[place]]])
                found += math.exp(log_p) / math.factorial(len(block))
            chances.append(found)
        total += math.log(sum(chances) / 3)
    assert score(ids, 2)[0] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_an_mtp_student_is_exact_call_by_call(shift: bool) -> None:
    """A continuation of three tokens takes a call of two and one of two that needs one; probabilities of all of them sum to 1."""
    model, ids = student("mtp", predict=2, context="drawn", shift=shift), [0, 2, 1, 0, 2]
    score = MaskedLikelihood(model, 1, 1)
    first, second = conditional(model, ids[:4], (2, 3)), conditional(model, [*ids, 0], (4, 5))
    assert score.exact and score.about == "exact"
    assert score(ids, 2)[0] == pytest.approx(float(first[0, 1] + first[1, 0] + second[0, 2]), abs=1e-9)
    found = [score(word, 2) for word in words(3)]
    assert sum(math.exp(log_p) for log_p, _ in found) == pytest.approx(1, abs=1e-9) and sum(greedy for _, greedy in found) == 1
    shorter = [score([*GIVEN, 0], 2)[0], *[score([*GIVEN, 0, token], 2)[0] for token in range(V)]]
    assert math.log(sum(map(math.exp, shorter[1:]))) == pytest.approx(shorter[0], abs=1e-9), "a word's chance is that of all that begin with it"
    alone = conditional(model, [0, 2, 1], (1, 2))  # calls begin where the continuation does
    rest = conditional(model, [0, 2, 1, 0, 0], (3, 4))
    assert score([0, 2, 1, 0], 1)[0] == pytest.approx(float(alone[0, 2] + alone[1, 1] + rest[0, 0]), abs=1e-9)
    end = conditional(model, [0, 2, 1, 0, 2, 1], (5,))  # the row ends with one mask
    assert score([0, 2, 1, 0, 2, 1], 5)[0] == pytest.approx(float(end[0, 1]), abs=1e-9)


def test_an_mtp_student_with_noise_is_averaged_over_it_call_by_call() -> None:
    model, ids = student("mtp", NOISE, predict=2, context="drawn"), [0, 2, 1, 0, 2]
    score, total, best = MaskedLikelihood(model, 5, 1), 0.0, [0, 0]
    assert not score.exact and "5 draws of prior noise" in score.about
    whole = [*ids, 0]
    for call in ((2, 3), (4, 5)):
        position_N, chances = torch.tensor(call), []
        for draw in range(5):
            row = torch.tensor([whole[: call[-1] + 1]])
            row[0, position_N] = model.mask_id
            g_NV = score._noise(torch.full_like(position_N, draw), position_N, sequence_id(ids[:2]))
            log_p_NV = model.logits(row, g_NV).log_softmax(-1)
            chances.append(math.exp(sum(float(log_p_NV[k, ids[at]]) for k, at in enumerate(call) if at < len(ids))))
            best = log_p_NV.argmax(1).tolist() if draw == 0 and call == (2, 3) else best
        total += math.log(sum(chances) / 5)
    assert score(ids, 2)[0] == pytest.approx(total, abs=1e-5)
    assert [word[2:] for word in words(2) if score(word, 2)[1]] == [best], "greedy is under the first draw's noise"


def test_greedy_is_said_of_the_one_continuation_that_greedy_decoding_writes() -> None:
    for model in (student("mdlm"), student("bd3lm", block_size=1), student("mdlm", NOISE)):
        assert sum(MaskedLikelihood(model, 1, 1)(ids, 2)[1] for ids in words(2)) == 1


def test_a_causal_student_is_exact(tmp_path: Path) -> None:
    write_student(tmp_path / "ar", kind="ar", seed=4)
    score = CausalLikelihood(CausalLM(str(tmp_path / "ar")))
    single = [score([0, 5, a], 2) for a in range(24)]
    assert sum(math.exp(log_p) for log_p, _ in single) == pytest.approx(1, abs=1e-5) and sum(greedy for _, greedy in single) == 1
    assert score([0, 5, 3, 7], 2)[0] == pytest.approx(score([0, 5, 3], 2)[0] + score([0, 5, 3, 7], 3)[0], abs=1e-4)


def test_noise_students_see_noise_that_does_not_know_the_answer() -> None:
    """Probabilities of all answers sum to 1 where they are exact and to less where they are bounds; with posterior noise each would be near 1."""
    for size in (1, 2):
        alone = MaskedLikelihood(student("bd3lm", NOISE, block_size=size), 15, 1)
        assert not alone.exact and sum(math.exp(alone(ids, 2)[0]) for ids in words(3)) == pytest.approx(1, abs=1e-5)
    masked = MaskedLikelihood(student("mdlm", NOISE), 30, 1)
    assert 0 < sum(math.exp(masked(ids, 2)[0]) for ids in words(2)) < 1


def test_a_mean_of_bounds_is_below_the_log_of_the_mean() -> None:
    alone = student("bd3lm", NOISE, block_size=1)
    for ids in words(2)[:4]:
        single = [MaskedLikelihood(alone, 1, seed)(ids, 2)[0] for seed in range(1, 6)]
        assert sum(single) / 5 < math.log(sum(map(math.exp, single)) / 5)


def test_a_score_is_the_seeds_and_choices_of_one_question_share_noise() -> None:
    model = student("mdlm", NOISE)
    score = MaskedLikelihood(model, 3, 1)
    first = score([0, 2, 1, 0], 2)[0]
    score([0, 1, 1, 0], 2)
    assert score([0, 2, 1, 0], 2)[0] == first != MaskedLikelihood(model, 3, 2)([0, 2, 1, 0], 2)[0]
    seen: list[torch.Tensor] = []
    real = model.predict
    model.predict = lambda ids, g: (seen.append(g), real(ids, g))[1]
    score([0, 2, 1, 0], 2), score([0, 2, 2, 2], 2), score([0, 1, 2, 2], 2)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0][:2], seen[2][:2])


def test_noise_temperature_scales_the_noise_that_is_seen_and_changes_the_score() -> None:
    model, ids = student("mdlm", NOISE), [0, 2, 1, 0]
    seen: list[torch.Tensor] = []
    real = model.predict
    model.predict = lambda ids, g: (seen.append(g), real(ids, g))[1]
    whole, half = (MaskedLikelihood(model, 3, 1, temperature)(ids, 2)[0] for temperature in (1.0, 0.5))
    assert torch.equal(seen[1], 0.5 * seen[0]) and whole != half


def test_windows_score_every_token_once_after_all_the_context_that_fits() -> None:
    ids = [9, *range(100, 120)]
    assert list(windows(ids[:8], 5, 8)) == [(ids[:8], 5)]
    assert list(windows(ids, 18, 8)) == [([9, *ids[14:]], 5)]
    for given in (1, 4, 12):
        parts = list(windows(ids, given, 8))
        assert [token for row, known in parts for token in row[known:]] == ids[given:]
        assert all(len(row) <= 8 and row[0] == 9 for row, _ in parts)
    assert next(windows(ids[:10], 1, 8)) == (ids[:8], 1)
