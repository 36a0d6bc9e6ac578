"""The known languages: their sentences are counted, their teacher is the joint, and the limit of factorised decoding is exact."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch

from eval.exact import write_dataset
from eval.factorised import accepted, factorised, valid_and_distance
from eval.languages import CITIES, LANGUAGES, MAZE, MOVES, STILL, Language, language
from eval.sampler import Decoding, blank_rows, sample
from trainer.config import NoiseConfig
from trainer.data import NoiseDataset

TINY = Language("tiny", {("a", "b", "c"): 3.0, ("a", "a", "b"): 1.0, ("b", "b", "c"): 2.0, ("c", "a", "a"): 1.5, ("c", "b", "b"): 0.5})
NAMES = list(LANGUAGES)


def sentences(name: str) -> list[list[str]]:
    known = language(name)
    return [[known.symbols[token] for token in ids] for ids in known.ids_ML]


@pytest.mark.parametrize("name", NAMES)
def test_the_teachers_conditionals_multiply_to_the_joint(name):
    known = language(name)
    ids_ML = torch.from_numpy(known.ids_ML)
    rows_BL = torch.cat([torch.zeros(len(ids_ML), 1, dtype=torch.int64), ids_ML], 1)
    p_ML = known.transition[known.walk(rows_BL)[:, :-1]].gather(2, ids_ML[..., None])[..., 0]
    assert np.allclose(p_ML.prod(1).numpy(), known.p_M, atol=1e-14) and known.p_M.sum() == pytest.approx(1)
    assert torch.allclose(known.transition.sum(1), torch.ones(len(known.prefixes), dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_texts_and_rollouts_are_sentences_with_their_probabilities(name):
    from scipy.stats import chisquare

    known = language(name)
    for ids_SL in (known.texts(3000, known.length + 1, 5), known.rollout(torch.arange(3000), known.length + 1, 5)):
        found_S = known.find(ids_SL[:, 1:].numpy())
        assert (known.ids_ML[found_S] == ids_SL[:, 1:].numpy()).all()
        likely = known.p_M * 3000 >= 5
        seen_M = np.bincount(found_S, minlength=len(known.p_M))
        pooled = [*seen_M[likely], seen_M[~likely].sum()], [*known.p_M[likely] * 3000, known.p_M[~likely].sum() * 3000]
        seen, expected = (np.array(values[: likely.sum() + (~likely).any()]) for values in pooled)
        assert chisquare(seen, expected).pvalue > 1e-4


def test_trips_go_between_different_cities_of_two_words():
    trips = sentences("cities")
    assert len(trips) == len(CITIES) * (len(CITIES) - 1) == len({tuple(trip) for trip in trips})
    for trip in trips:
        one, other = " ".join(trip[:2]), " ".join(trip[2:])
        assert one in CITIES and other in CITIES and one != other
    first = {city: sum(p for trip, p in zip(trips, language("cities").p_M, strict=True) if " ".join(trip[:2]) == city) for city in CITIES}
    assert first == pytest.approx({city: weight / sum(CITIES.values()) for city, weight in CITIES.items()})


def test_every_equation_is_right_and_there_are_fifty():
    equations = sentences("arithmetic")
    assert len(equations) == 50
    for a, sign, b, equals, tens, ones in equations:
        assert equals == "=" and int(tens + ones) == (int(a) + int(b) if sign == "+" else int(a) * int(b))


def test_brackets_are_counted_by_catalan_and_close_in_order():
    strings = {"".join(string) for string in sentences("brackets")}
    catalan = math.comb(6, 3) // 4
    assert len(strings) == catalan * 2**3
    expected = {"".join(string) for string in product("()[]", repeat=6) if balanced("".join(string))}
    assert strings == expected


def balanced(string: str) -> bool:
    while (shorter := string.replace("()", "").replace("[]", "")) != string:
        string = shorter
    return not string


def test_ways_are_all_that_lead_through_the_maze_without_crossing_themselves():
    ways, length, goal = {tuple(way) for way in sentences("maze")}, language("maze").length, (len(MAZE) - 1, len(MAZE[0]) - 1)
    expected = {(*way, *[STILL] * (length - moves)) for moves in range(length + 1) for way in walks(moves) if walk(way)[-1] == goal}
    assert ways == expected and {len(way) - way.count(STILL) for way in ways} == {6, 8}


def walks(moves: int) -> list[tuple[str, ...]]:
    goal = (len(MAZE) - 1, len(MAZE[0]) - 1)
    found: list[tuple[str, ...]] = [()]
    for _ in range(moves):
        longer = [(*way, move) for way in found for move in MOVES if goal not in walk(way)]
        found = [way for way in longer if allowed(walk(way))]
    return found


def walk(way: tuple[str, ...]) -> list[tuple[int, int]]:
    squares = [(0, 0)]
    for move in way:
        squares.append((squares[-1][0] + MOVES[move][0], squares[-1][1] + MOVES[move][1]))
    return squares


def allowed(squares: list[tuple[int, int]]) -> bool:
    row, column = squares[-1]
    inside = 0 <= row < len(MAZE) and 0 <= column < len(MAZE[0])
    return inside and MAZE[row][column] == "." and len(set(squares)) == len(squares)


def test_what_is_no_sentence_is_found_nowhere():
    assert TINY.find(np.array([[1, 2, 3], [1, 2, 2], [3, 1, 1], [2, 2, 1]])).tolist() == [0, -1, 3, -1]


def test_a_dataset_of_a_language_holds_noise_that_chooses_its_text(tmp_path):
    write_dataset(tmp_path, TINY, 50, 4, text_seed=1, draws=2)
    dataset = NoiseDataset(tmp_path)
    for draw in (0, 1):
        batch = dataset.batch(np.arange(50), draw)
        where_N = batch.valid_BL.flatten().nonzero()[:, 0]
        log_p_NV = TINY.log_p[TINY.walk(batch.input_ids_BL).flatten()[where_N - 1]]
        assert ((log_p_NV + batch.noise_at(where_N)).argmax(1) == batch.input_ids_BL.flatten()[where_N]).all()


class Best:
    """The best student without noise, as a student: p(token | what is known) by enumeration; anything where that is impossible."""

    noise, ahead = NoiseConfig(), 0

    def __init__(self, known: Language):
        self.known, self.vocab_size, self.mask_id, self.block_length = known, known.vocab_size, known.vocab_size, known.length + 1

    def logits(self, ids_BL: torch.Tensor, g_NV: torch.Tensor | None) -> torch.Tensor:
        found = []
        for ids_L in ids_BL[:, 1:].numpy():
            fits_M = ((self.known.ids_ML == ids_L) | (ids_L == self.mask_id)).all(1)
            weight_M = self.known.p_M * fits_M if fits_M.any() else self.known.p_M
            for at in (ids_L == self.mask_id).nonzero()[0]:
                found.append(np.bincount(self.known.ids_ML[:, at], weights=weight_M, minlength=self.vocab_size))
        return torch.from_numpy(np.stack(found)).log().float()


@pytest.mark.parametrize("nfe", [1, 2, 3])
def test_the_limit_is_the_sum_over_all_orders(nfe):
    groups = {1: [(0, 1, 2)], 2: [(0, 1), (2,)], 3: [(0,), (1,), (2,)]}[nfe]
    expected_M = np.zeros(len(TINY.p_M))
    for order in permutations(range(3)):
        for number, ids in enumerate(TINY.ids_ML):
            known, q = [], 1.0
            for group in groups:
                places = [order[at] for at in group]
                fits_M = (TINY.ids_ML[:, known] == ids[known]).all(1)
                q *= math.prod(TINY.p_M[fits_M & (TINY.ids_ML[:, at] == ids[at])].sum() / TINY.p_M[fits_M].sum() for at in places)
                known += places
            expected_M[number] += q / 6
    assert np.allclose(factorised(TINY, nfe), expected_M, atol=1e-14)


def test_the_limit_is_what_the_sampler_does_with_the_best_student():
    student = Best(TINY)
    ids_SL = sample(student, blank_rows(student, 6000, 4, 0), torch.arange(6000), 3, Decoding(2))[:, 1:].numpy()
    seen_M = np.bincount(TINY.find(ids_SL) + 1, minlength=len(TINY.p_M) + 1)[1:] / 6000
    assert np.abs(seen_M - factorised(TINY, 2)).max() < 4 * math.sqrt(0.25 / 6000)


@pytest.mark.parametrize("name", NAMES)
def test_the_limit_of_one_call_is_the_product_of_marginals_and_of_one_token_a_call_the_truth(name):
    known = language(name)
    one_M = known.marginals[np.arange(known.length), known.ids_ML].prod(1)
    assert np.allclose(factorised(known, 1), one_M, atol=1e-14)
    valid, distance = valid_and_distance(known, one_M)
    assert valid == pytest.approx(one_M.sum()) and valid < 0.2 and distance > 0.8
    assert valid_and_distance(known, factorised(known, known.length)) == pytest.approx((1, 0), abs=1e-12)


def test_accepted_tokens_are_those_of_speculative_sampling():
    q_LV = np.random.default_rng(0).dirichlet(np.ones(4), size=3)
    ids = np.array(list(product(range(4), repeat=3)))
    drafted, expected = q_LV[np.arange(3), ids].prod(1), 0.0
    for draft, chance in zip(ids, drafted, strict=True):
        state, alive = 0, 1.0
        for at, token in enumerate(draft):
            p = float(TINY.transition[state, token])
            alive *= min(1.0, p / q_LV[at, token])
            expected += chance * alive
            state = int(TINY.next_state[state, token])
            if not p:
                break
    assert accepted(TINY, q_LV[None])[0] == pytest.approx(expected)
    assert accepted(TINY, np.zeros((1, 3, 4))) == 0
