"""The stream is the one that DESIGN.md specifies, bit for bit, however it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from noise import philox
from tests.noise import reference
from tests.noise.paths import PATHS, through

SEED, SEQUENCE, POSITION, DRAW = 0xFEDCBA9876543210, 0x8000000300000007, 2**24 - 2, 200


def signed(value: int) -> int:
    """The int64 with the bit pattern of a uint64."""
    return value - 2**64 if value >= 2**63 else value


def some_rows(count: int, seed: int = SEED) -> torch.Tensor:
    sequence_id_N = torch.arange(count) // 7 + (5 << 32)
    return philox.rows(seed, sequence_id_N, torch.arange(count) % 7 + 1)


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_random123_known_answers(counter: list[int], key: list[int], output: list[int]) -> None:
    assert [int(word) for word in philox.philox(*torch.tensor(counter + key))] == output
    assert list(reference.philox4x32(tuple(counter), tuple(key))) == output  # type: ignore[arg-type]


def test_counter_and_key_are_laid_out_as_specified() -> None:
    row_15 = philox.rows(SEED, torch.tensor([signed(SEQUENCE)]), torch.tensor([POSITION]), DRAW)
    assert row_15.tolist() == [[0x76543210, 0xFEDCBA98, POSITION + DRAW * 2**24, 7, 0x80000003]]
    expected = [reference.word(SEED, SEQUENCE, POSITION, DRAW, entry) for entry in range(10)]
    assert philox.words(row_15, 10).tolist() == [expected]
    e0 = philox.exponential(torch.tensor([reference.winner_word(SEED, SEQUENCE, POSITION, DRAW)]))
    assert torch.equal(philox.winner_exponential(row_15), e0)


@given(
    seed=st.integers(0, 2**64 - 1), sequence_id=st.integers(0, 2**64 - 1), position=st.integers(0, 2**24 - 1),
    draw=st.integers(0, 255), entry=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_word_is_the_reference_word(seed: int, sequence_id: int, position: int, draw: int, entry: int) -> None:
    row_15 = philox.rows(seed, torch.tensor([signed(sequence_id)]), torch.tensor([position]), draw)
    assert int(philox.words_at(row_15, torch.tensor([entry]))) == reference.word(seed, sequence_id, position, draw, entry)
    seed_1 = torch.tensor([signed(seed)])
    assert torch.equal(philox.rows(seed_1, torch.tensor([signed(sequence_id)]), torch.tensor([position]), torch.tensor([draw])), row_15)
    assert torch.equal(philox.with_draw(philox.rows(seed, torch.tensor([signed(sequence_id)]), torch.tensor([position]), 1), draw), row_15)


@pytest.mark.parametrize(
    ("word", "v"),
    [
        (0, 2.0**-33),
        (1, 1.5 * 2.0**-32),
        (2**23, 2.0**-9),  # 2^23 + 1/2 is a tie, the even neighbour is below
        (2**23 + 1, (2**23 + 2) * 2.0**-32),  # and here above
        (2**24 + 1, 2.0**-8),  # the word itself is a tie, even below
        (2**24 + 3, (2**24 + 4) * 2.0**-32),  # even above
        (2**32 - 2**9, 1 - 2.0**-23),
        (2**32 - 2**8, 1 - 2.0**-24),
        (2**32 - 129, 1 - 2.0**-24),
        (2**32 - 1, 1 - 2.0**-24),  # would round to 1
    ],
)
def test_uniform_at_its_edges(word: int, v: float) -> None:
    assert float(philox.uniform(torch.tensor([word]))) == v == float(reference.uniform(word))


def test_exponential_is_finite_positive_and_within_two_ulp_everywhere() -> None:
    random = np.random.default_rng(1).integers(0, 2**32, 50_000, dtype=np.int64)
    edges = np.concatenate([np.arange(300), 2**24 + np.arange(-300, 300), 2**32 - np.arange(1, 300), 2 ** np.arange(32)])
    word = torch.from_numpy(np.concatenate([random, edges]))
    e = philox.exponential(word).numpy()
    exact = -np.log1p(-philox.uniform(word).numpy().astype(np.float64))
    assert (np.abs(e - exact) <= 2 * np.spacing(exact.astype(np.float32))).all()
    assert e.min() > 0
    assert -np.log(e.min()) > 22  # a float32 uniform in [2^-24, 1) would cap the Gumbel at 16.6


def test_words_at_equals_words() -> None:
    rows_N5 = some_rows(20)
    words_NV = philox.words(rows_N5, 1003)
    owner_K, index_K = torch.randint(20, (500,)), torch.randint(1003, (500,))
    assert torch.equal(philox.words_at(rows_N5[owner_K], index_K), words_NV[owner_K, index_K])


@pytest.mark.parametrize("vocab_size", [2, 50_257, 151_936, 200_003])
def test_the_last_words_of_a_vocabulary_are_the_reference_words(vocab_size: int) -> None:
    row_15 = philox.rows(SEED, torch.tensor([signed(SEQUENCE)]), torch.tensor([POSITION]), DRAW)
    last = range(max(0, vocab_size - 5), vocab_size)
    assert philox.words(row_15, vocab_size)[0, last.start :].tolist() == [reference.word(SEED, SEQUENCE, POSITION, DRAW, i) for i in last]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocab_size", [3, 10_007, 70_000])
def test_gumbel_is_minus_log_of_the_exponential(path: str, vocab_size: int) -> None:
    rows_N5 = some_rows(9)
    exact_NV = -torch.log(-torch.log1p(-philox.uniform(philox.words(rows_N5, vocab_size)).double()))
    with through(path):
        torch.testing.assert_close(philox.gumbel(rows_N5, vocab_size).double(), exact_NV, atol=4e-7, rtol=4e-7)


def test_neighbours_in_every_coordinate_of_the_stream_are_independent_uniforms() -> None:
    """Entries of one block and of the next, positions, draws, sequences, their high words, seeds and theirs: flat 16 x 16 tables."""
    place_N = torch.arange(50_000)

    def u(entry: int = 0, seed: int = 9, sequence_id: int = 0, position: int = 1, draw: int = 0) -> np.ndarray:
        rows_N5 = philox.rows(seed, place_N // 10_000 + sequence_id, position + place_N % 10_000, draw)
        return philox.uniform(philox.words_at(rows_N5, torch.full_like(place_N, entry))).double().numpy()

    e0_N = philox.winner_exponential(philox.rows(9, place_N // 10_000, 1 + place_N % 10_000))
    neighbours = {
        "lane": u(entry=1), "block": u(entry=4), "position": u(position=2), "draw": u(draw=1), "sampling": u(draw=128),
        "sequence": u(sequence_id=1), "sequence's high word": u(sequence_id=1 << 32),
        "seed": u(seed=10), "seed's high word": u(seed=9 + (1 << 32)), "E_0": np.exp(-e0_N.double().numpy()),
    }  # fmt: skip
    for name, other_N in neighbours.items():
        table = np.histogram2d(u(), other_N, 16, ((0, 1), (0, 1)))[0].reshape(-1)
        assert stats.chisquare(table).pvalue > 1e-4, name
        assert stats.kstest(other_N, "uniform").pvalue > 1e-4, name


@pytest.mark.parametrize("vocab_size", [2, 3, 4, 5, 1001, 1003])
def test_words_do_not_depend_on_vocabulary_chunk_or_order(vocab_size: int) -> None:
    rows_N5 = some_rows(24)
    words_NV = philox.words(rows_N5, 1004)[:, :vocab_size]
    assert torch.equal(philox.words(rows_N5, vocab_size), words_NV)
    assert torch.equal(torch.cat([philox.words(part_N5, vocab_size) for part_N5 in rows_N5.split(5)]), words_NV)
    order_N = torch.randperm(24)
    assert torch.equal(philox.words(rows_N5[order_N], vocab_size), words_NV[order_N])
    assert torch.equal(philox.gumbel(rows_N5[order_N], vocab_size), philox.gumbel(rows_N5, vocab_size)[order_N])


def test_places_share_no_noise() -> None:
    sequence_id_N = torch.tensor([1, 1, 1, 2, 1 << 32])
    position_N, draw_N = torch.tensor([1, 2, 1, 1, 1]), torch.tensor([0, 0, 1, 0, 0])
    words_NV = philox.words(philox.rows(SEED, sequence_id_N, position_N, draw_N), 4000)
    others_NV = philox.words(philox.rows(SEED ^ 1, sequence_id_N, position_N, draw_N), 4000)
    assert len(torch.cat([words_NV, others_NV]).unique()) > 10 * 4000 - 10  # a word in common is a chance of 2^-32 a pair


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"draw": 256}, "draw is 256"),
        ({"position": torch.tensor([2**24])}, "positions reach from 16777216"),
        ({"position": torch.tensor([-1])}, "positions reach from -1"),
    ],
)
def test_places_outside_the_stream_are_refused(change: dict[str, object], message: str) -> None:
    place = {"seed": 1, "sequence_id": torch.tensor([0]), "position": torch.tensor([0]), "draw": 0} | change
    with pytest.raises(ValueError, match=message):
        philox.rows(**place)  # type: ignore[arg-type]
