"""Every bound of the sketch holds for every entry and every draw, whatever the vocabulary, the teacher and the epsilon.

Bounds are checked against float64 noise made from the stream's own uniforms; 1e-5 is what float32 may add.
"""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from noise import candidates, philox
from noise.decode import decode
from noise.posterior import posterior_gumbel
from noise.sketch import Codec, Sketch, TeacherError, _threshold, dequantise, encode, justified, quantise, select
from tests.noise import reference, teachers
from tests.noise.paths import PATHS, through

FLOAT32 = 1e-5
SEED = 77

epsilons = st.one_of(st.floats(0.004, 0.69), st.sampled_from([0.004, 0.124999, 0.125, 0.1250001, 0.5, 0.69]))


def places(positions: int, draw: int = 0, sequence_id: int = 0) -> torch.Tensor:
    return philox.rows(SEED, torch.full((positions,), sequence_id), torch.arange(1, positions + 1), draw)


def exact_noise(log_probs_NV: torch.Tensor, token_N: torch.Tensor, rows_N5: torch.Tensor) -> np.ndarray:
    """The posterior in float64, from the stream's uniforms."""
    v_NV = philox.uniform(philox.words(rows_N5, log_probs_NV.shape[1])).numpy().astype(np.float64)
    e0_word_N = [reference.winner_word(k0 + (k1 << 32), c2 + (c3 << 32), c1 % 2**24, c1 // 2**24) for k0, k1, c1, c2, c3 in rows_N5.tolist()]
    log_e0_N1 = np.log([[reference.exponential(word)] for word in e0_word_N])
    log_probs = log_probs_NV.numpy().astype(np.float64)
    g_NV = -np.log(-np.log1p(-v_NV) + np.exp(log_probs + log_e0_N1))
    at = token_N.numpy()[:, None]
    np.put_along_axis(g_NV, at, -np.take_along_axis(log_probs, at, 1) - log_e0_N1, 1)
    return g_NV


def kept_mask(sketch: Sketch, vocab_size: int) -> np.ndarray:
    mask_NV = np.zeros((len(sketch.kept_N), vocab_size), dtype=bool)
    mask_NV[np.repeat(np.arange(len(sketch.kept_N)), sketch.kept_N.numpy()), sketch.index_K.numpy()] = True
    return mask_NV


def hold_every_bound(log_probs_NV: torch.Tensor, token_N: torch.Tensor, codec: Codec, rows_N5: torch.Tensor) -> Sketch:
    """Encode, check the sketch's shape, then decode each draw and check each entry."""
    made = encode(log_probs_NV, token_N, rows_N5, codec)
    kept_NV, is_token_NV = kept_mask(made, codec.vocab_size), np.zeros(log_probs_NV.shape, dtype=bool)
    np.put_along_axis(is_token_NV, token_N.numpy()[:, None], True, 1)
    assert torch.equal(made.log_prob_N, log_probs_NV.gather(1, token_N[:, None])[:, 0])
    assert not (kept_NV & is_token_NV).any()
    owner_K = np.repeat(np.arange(len(token_N)), made.kept_N.numpy())
    assert (np.diff(owner_K * 2**32 + made.index_K.numpy()) > 0).all(), "entries ascend within a position"
    assert justified(made, rows_N5, codec).all()
    for draw in range(codec.draws):
        at_draw = philox.with_draw(rows_N5, draw)
        g_NV = decode(made, token_N, at_draw, codec).numpy().astype(np.float64)
        error_NV = g_NV - exact_noise(log_probs_NV, token_N, at_draw)
        free = error_NV[~kept_NV & ~is_token_NV]
        assert free.size == 0 or (free.min() >= -FLOAT32 and free.max() <= codec.epsilon + FLOAT32)
        coded = error_NV[kept_NV]
        assert coded.size == 0 or (coded.min() > -codec.step - FLOAT32 and coded.max() <= FLOAT32)
        representable = np.spacing(np.abs(g_NV[is_token_NV]).astype(np.float32))  # above 1e-5 where p_x < e^-128
        assert (np.abs(error_NV[is_token_NV]) <= np.maximum(FLOAT32, representable)).all()
        assert np.array_equal((log_probs_NV.numpy().astype(np.float64) + g_NV).argmax(1), token_N.numpy())
    return made


@given(
    vocab_size=st.one_of(st.integers(2, 40), st.integers(2, 3000)), shape=st.sampled_from(teachers.SHAPES), seed=st.integers(0, 10**6),
    epsilon=epsilons, draws=st.integers(1, 16), sampled=st.booleans(), path=st.sampled_from(PATHS),
)  # fmt: skip
@example(vocab_size=2, shape="two-way", seed=0, epsilon=0.69, draws=16, sampled=False, path="torch")
@example(vocab_size=3000, shape="on the grid", seed=0, epsilon=0.125, draws=16, sampled=True, path="torch")
@example(vocab_size=300, shape="zipf", seed=0, epsilon=2.0**-10, draws=2, sampled=True, path="torch")
@example(vocab_size=300, shape="flat", seed=0, epsilon=math.nextafter(math.log(2), 0), draws=2, sampled=True, path="torch")
@example(vocab_size=50, shape="zipf", seed=0, epsilon=0.125, draws=128, sampled=True, path="torch")
def test_every_bound_holds(vocab_size: int, shape: str, seed: int, epsilon: float, draws: int, sampled: bool, path: str) -> None:
    log_probs_NV = teachers.log_probs(shape, 5, vocab_size, seed)
    possible_NV = torch.isfinite(log_probs_NV).float()
    token_N = (
        teachers.sample(log_probs_NV, seed) if sampled else torch.multinomial(possible_NV, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    )
    codec = Codec(vocab_size, epsilon, draws)
    with through(path):
        hold_every_bound(log_probs_NV, token_N, codec, places(5, sequence_id=seed))


@pytest.mark.parametrize(
    ("vocab_size", "epsilon", "draws", "index_bytes", "code_bytes"),
    [
        (50_257, 0.125, 1, 2, 1),
        (65_536, 0.1, 2, 2, 2),
        (65_537, 0.3, 2, 4, 1),
        (151_936, 0.125, 1, 4, 1),
        (200_000, 0.01, 2, 4, 2),
        (60_000, 0.69, 16, 2, 1),
    ],
)
@pytest.mark.parametrize("shape", ["zipf", "flat"])
def test_every_bound_holds_for_large_vocabularies(shape: str, vocab_size: int, epsilon: float, draws: int, index_bytes: int, code_bytes: int) -> None:
    codec = Codec(vocab_size, epsilon, draws)
    assert (codec.index_bytes, codec.code_bytes) == (index_bytes, code_bytes)
    log_probs_NV = teachers.log_probs(shape, 2, vocab_size, seed=draws)
    made = hold_every_bound(log_probs_NV, teachers.sample(log_probs_NV, 1), codec, places(2))
    assert int(made.index_K.max()) < 256**index_bytes and int(made.code_K.max()) < 256**code_bytes - 1


@given(
    vocab_size=st.integers(3_001, 200_000),
    shape=st.sampled_from(teachers.SHAPES),
    seed=st.integers(0, 10**6),
    epsilon=epsilons,
    draws=st.integers(1, 2),
)
@settings(max_examples=25)
def test_every_bound_holds_for_any_large_vocabulary(vocab_size: int, shape: str, seed: int, epsilon: float, draws: int) -> None:
    log_probs_NV = teachers.log_probs(shape, 2, vocab_size, seed)
    hold_every_bound(log_probs_NV, teachers.sample(log_probs_NV, seed), Codec(vocab_size, epsilon, draws), places(2, sequence_id=seed))


@pytest.mark.parametrize("shape", teachers.SHAPES)
def test_the_kept_set_is_the_exact_one_up_to_rounding_at_its_edge(shape: str) -> None:
    codec, vocab_size = Codec(90, 0.05), 90
    log_probs_NV = teachers.log_probs(shape, 6, vocab_size, seed=9)
    token_N = teachers.sample(log_probs_NV, 9)
    kept_NV = kept_mask(encode(log_probs_NV, token_N, places(6), codec), vocab_size)
    for n in range(6):
        e0 = reference.exponential(reference.winner_word(SEED, 0, n + 1, 0))
        for i in range(vocab_size):
            if i == int(token_N[n]):
                continue
            log_p, word = float(log_probs_NV[n, i]), reference.word(SEED, 0, n + 1, 0, i)
            limit = reference.threshold(log_p, e0, codec.epsilon) if math.isfinite(log_p) else 0
            if abs(word - limit) > max(1, limit * 2.0**-20):
                assert kept_NV[n, i] == (word < limit)
                assert kept_NV[n, i] == (reference.moved(log_p, reference.exponential(word), e0) > codec.epsilon)


def on_the_edge(rows_N5: torch.Tensor, vocab_size: int, codec: Codec, nats: float) -> torch.Tensor:
    """The adversary knows the noise: float32 log-probs [N, V] that move every entry by epsilon and `nats` of its probability more."""
    e_NV = -torch.log1p(-philox.uniform(philox.words(rows_N5, vocab_size)).double())
    return (torch.log(codec.c * e_NV / philox.winner_exponential(rows_N5).double()[:, None]) + nats).float()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("vocab_size", "epsilon"), [(20_000, 0.125), (70_001, 0.6), (5_000, 0.004)])
def test_an_adversary_at_every_entrys_threshold_gains_nothing(vocab_size: int, epsilon: float, path: str) -> None:
    codec, rows_N5, token_N = Codec(vocab_size, epsilon), places(12), torch.arange(12)
    with through(path):
        for nats, fate in ((1e-4, True), (-1e-4, False)):
            log_probs_NV = on_the_edge(rows_N5, vocab_size, codec, nats)
            # no probability is above 1, and beyond E = 5 the threshold's 2^-20 weighs more than these nats
            beyond_NV = (log_probs_NV > 0) | (philox.exponential(philox.words(rows_N5, vocab_size)) > 5)
            log_probs_NV[beyond_NV] = -math.inf
            log_probs_NV[torch.arange(12), token_N] = -30.0
            made = encode(log_probs_NV, token_N, rows_N5, codec)
            wanted_NV = fate & ~beyond_NV.numpy()
            wanted_NV[np.arange(12), token_N] = False
            assert np.array_equal(kept_mask(made, vocab_size), wanted_NV)
            hold_every_bound(log_probs_NV, token_N, codec, rows_N5)


@pytest.mark.parametrize("shape", teachers.SHAPES)
@pytest.mark.parametrize(("vocab_size", "draws"), [(7, 16), (9_001, 3)])
def test_numba_and_torch_make_the_same_sketch(shape: str, vocab_size: int, draws: int) -> None:
    codec, log_probs_NV = Codec(vocab_size, 0.1, draws), teachers.log_probs(shape, 20, vocab_size, seed=19)
    token_N, made = teachers.sample(log_probs_NV, 19), []
    for path in ("torch", PATHS[-1]):
        with through(path):
            made.append(encode(log_probs_NV, token_N, places(20), codec))
    for one, other in zip(*(sketch.tensors() for sketch in made), strict=True):
        assert torch.equal(one, other)


def test_the_search_loses_no_word_however_small_or_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word near a power of two against every threshold just above it: small words are too rare in the stream to wait for."""
    words = sorted({word for power in range(33) for word in range(2**power - 3, 2**power + 3) if 0 <= word < 2**32})
    word_V = torch.tensor(words[: len(words) // 4 * 4])
    monkeypatch.setattr(philox, "philox", lambda block, *_: word_V.view(-1, 4)[block].unbind(-1))
    for ceiling in (1e-12, 0.05, 7.5, 17e3):
        y_V = (word_V.double() + 0.5) * 2.0**-32 / (1 + 2.0**-20)
        logits_NV = (torch.log(y_V / ceiling) + 1e-6)[None].float()
        offset_N = torch.tensor([3.0])  # logits with a normaliser of their own
        with through("torch"):
            found = candidates.find(logits_NV + offset_N, offset_N, places(1), torch.tensor([ceiling]))
        assert torch.equal(found.index_K, torch.arange(len(word_V))) and torch.equal(found.word_K, word_V)


@pytest.mark.parametrize("y", [0.0, 1e-38, 1e-12, 2.0**-33, 1e-9, 1e-7, 1e-4, 0.3, 0.5, 1.0, 7.0, 21.0, 22.5, 1e4])
def test_thresholds_are_the_specified_ones_over_all_magnitudes(y: float) -> None:
    exact = (1 - (-Decimal(y)).exp()) * 2**32 * (1 + Decimal(2) ** -20) - Decimal("0.5")
    expected = min(2**32, math.ceil(exact))
    assert abs(int(_threshold(torch.tensor([y], dtype=torch.float64))) - expected) <= (0 if y < 1e-4 else 1)


def test_logits_with_their_normaliser_make_the_sketch_of_their_log_probs() -> None:
    random, codec = torch.Generator().manual_seed(20), Codec(999, 0.125, 2)
    for kind in (torch.float32, torch.bfloat16):
        logits_NV = (4 * torch.randn(16, 999, generator=random) - 30).to(kind)
        normaliser_N = logits_NV.float().logsumexp(1)
        token_N = logits_NV.argmax(1)
        for path in PATHS:
            with through(path):
                made = encode(logits_NV, token_N, places(16), codec, normaliser_N)
                expected = encode(logits_NV.float() - normaliser_N[:, None], token_N, places(16), codec)
            for one, other in zip(made.tensors(), expected.tensors(), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize(("epsilon", "largest"), [(2.0**-10, 33_399), (0.125, 221), (0.69, 205)])
def test_the_least_probability_that_can_be_kept_has_a_code_to_spare(epsilon: float, largest: int) -> None:
    codec = Codec(100, epsilon)
    least = codec.c * 2.0**-33 / (24 * math.log(2))  # the least E over the greatest E_0
    assert int(quantise(torch.tensor([math.log(least)]), codec)) == largest < 256**codec.code_bytes - 1


@pytest.mark.parametrize("shape", ["flat", "zipf", "random", "peaked", "two-way", "on the grid"])
@pytest.mark.parametrize(("epsilon", "draws"), [(0.125, 1), (0.5, 4), (0.03, 2), (0.3, 16)])
def test_as_many_entries_are_kept_as_the_theorem_says(shape: str, epsilon: float, draws: int) -> None:
    positions, vocab_size = 1500, 100
    codec = Codec(vocab_size, epsilon, draws)
    log_probs_NV = teachers.log_probs(shape, positions, vocab_size, seed=10)
    token_N = teachers.sample(log_probs_NV, 10)
    made = encode(log_probs_NV, token_N, places(positions), codec)
    chance_NV = 1 - (1 + log_probs_NV.double().exp() / codec.c) ** -draws
    chance_NV.scatter_(1, token_N[:, None], 0.0)
    expected, kept = float(chance_NV.sum(1).mean()), made.kept_N.double()
    assert abs(float(kept.mean()) - expected) < 5 * float(kept.std()) / positions**0.5 + 1e-3
    assert expected <= codec.expected_kept_bound == pytest.approx(draws / math.expm1(epsilon))


def test_sketch_does_not_depend_on_chunks_or_order() -> None:
    codec, log_probs_NV = Codec(500, 0.1, 3), teachers.log_probs("zipf", 31, 500, seed=11)
    token_N, rows_N5 = teachers.sample(log_probs_NV, 11), places(31)
    whole = encode(log_probs_NV, token_N, rows_N5, codec)
    for size in (1, 2, 7, 30):
        cuts = zip(log_probs_NV.split(size), token_N.split(size), rows_N5.split(size), strict=True)
        parts = [encode(*cut, codec) for cut in cuts]
        for name in vars(whole):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    order_N = torch.randperm(31)
    mixed = encode(log_probs_NV[order_N], token_N[order_N], rows_N5[order_N], codec)
    for name, value in vars(select(whole, order_N)).items():
        assert torch.equal(getattr(mixed, name), value)


@given(chosen=st.lists(st.integers(0, 19), max_size=40))
def test_select_then_decode_is_decode_then_select(chosen: list[int]) -> None:
    codec, log_probs_NV = Codec(60, 0.06), teachers.log_probs("random", 20, 60, seed=12)
    token_N, rows_N5 = teachers.sample(log_probs_NV, 12), places(20)
    made, position_M = encode(log_probs_NV, token_N, rows_N5, codec), torch.tensor(chosen, dtype=torch.int64)
    found_MV = decode(select(made, position_M), token_N[position_M], rows_N5[position_M], codec)
    assert torch.equal(found_MV, decode(made, token_N, rows_N5, codec)[position_M])


def test_decoded_noise_tends_to_the_dense_posterior_as_epsilon_falls() -> None:
    log_probs_NV = teachers.log_probs("zipf", 40, 300, seed=13)
    token_N, rows_N5 = teachers.sample(log_probs_NV, 13), places(40)
    dense_NV = posterior_gumbel(log_probs_NV, token_N, rows_N5)
    for epsilon in (0.5, 0.1, 0.01, 2.0**-10):
        codec = Codec(300, epsilon)
        assert float((decode(encode(log_probs_NV, token_N, rows_N5, codec), token_N, rows_N5, codec) - dense_NV).abs().max()) <= epsilon + FLOAT32


@given(log_prob=st.floats(-70, 0, width=32), epsilon=epsilons)
@example(log_prob=-2.5, epsilon=0.125)
@example(log_prob=0.0, epsilon=0.125)
def test_codes_round_probabilities_up_by_less_than_a_step(log_prob: float, epsilon: float) -> None:
    codec = Codec(100, epsilon)
    code = quantise(torch.tensor([log_prob]), codec)
    if int(code) == 256**codec.code_bytes - 1:
        assert -log_prob >= codec.step * int(code)
        return
    ratio = math.log(float(dequantise(code, codec).double())) - log_prob
    assert -1e-6 <= ratio < codec.step + 1e-6


def test_a_planted_entry_is_not_justified() -> None:
    codec, log_probs_NV = Codec(5000, 0.125, 2), teachers.log_probs("zipf", 30, 5000, seed=14)
    token_N, rows_N5 = teachers.sample(log_probs_NV, 14), places(30)
    made = encode(log_probs_NV, token_N, rows_N5, codec)
    assert justified(made, rows_N5, codec).all()
    planted = replace(made, index_K=(made.index_K + 2500) % 5000)
    explained = justified(planted, rows_N5, codec)
    unlikely_K = dequantise(made.code_K, codec) < 0.05  # a likely entry would be kept at many words, so planting it can go unseen
    assert explained[unlikely_K].float().mean() < 0.25
    assert not justified(replace(made, code_K=torch.full_like(made.code_K, 255)), rows_N5, codec).any()
    assert not justified(made, places(30, sequence_id=1), codec).all(), "another place's noise justifies nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0.125, 1), "vocab_size is 1"),
        ((100, 0.0009, 1), "epsilon is 0.0009"),
        ((100, math.log(2), 1), "epsilon is 0.693"),
        ((100, math.nan, 1), "epsilon is nan"),
        ((100, 0.125, 0), "draws is 0"),
        ((100, 0.125, 129), "draws is 129"),
        ((200_000, 2.0**-10, 2), "could keep more than 65535 entries"),
        ((151_936, 0.1, 128), "could keep more than 65535 entries"),
    ],
)
def test_codecs_that_the_format_cannot_hold_are_refused(arguments: tuple[int, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codec(*arguments)


@pytest.mark.parametrize("arguments", [(65_536, 2.0**-10, 128), (200_000, 2.0**-10, 1), (151_936, 0.125, 128)])
def test_codecs_that_cannot_overflow_are_not_refused(arguments: tuple[int, float, int]) -> None:
    assert Codec(*arguments).draws == arguments[2]


def test_bad_teachers_are_refused_by_position() -> None:
    codec, log_probs_NV = Codec(50), teachers.log_probs("random", 4, 50, seed=15)
    token_N = torch.tensor([1, 2, 3, 4])
    for position, spoil, message in [(2, math.nan, "NaN or infinite logits"), (1, -math.inf, "probability zero")]:
        spoiled_NV = log_probs_NV.clone()
        spoiled_NV[position] = spoil
        with pytest.raises(TeacherError, match=message) as caught:
            encode(spoiled_NV, token_N, places(4), codec)
        assert caught.value.position == position
    with pytest.raises(TeacherError, match="token id 50 is not below the teacher's width 50") as caught:
        encode(log_probs_NV, torch.tensor([1, 2, 3, 50]), places(4), codec)
    assert caught.value.position == 3
    with pytest.raises(ValueError, match="logits are 50 wide; the dataset's vocab_size is 51"):
        encode(log_probs_NV, token_N, places(4), Codec(51))


def test_no_positions_make_an_empty_sketch() -> None:
    codec, none = Codec(50), torch.zeros(0, dtype=torch.int64)
    made = encode(torch.zeros(0, 50), none, places(0), codec)
    assert made.index_K.shape == (0,) and decode(made, none, places(0), codec).shape == (0, 50)
