"""The order of samples: permutations that are computed and not kept, windows of shards, mixtures with exact shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trainer.order import BLOCK, MixtureOrder, Order, epoch_order, permuted, quotas

SHARDS = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    first = epoch_order(1000, seed=3, epoch=0)
    assert sorted(first) == list(range(1000))
    assert np.array_equal(first, epoch_order(1000, seed=3, epoch=0))
    assert not np.array_equal(first, epoch_order(1000, seed=3, epoch=1))
    assert not np.array_equal(first, epoch_order(1000, seed=4, epoch=0))


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1), st.integers(0, 99))
def test_every_size_is_permuted(size, seed, number):
    assert np.array_equal(np.sort(permuted(np.arange(size), size, (seed, 0, number, 0))), np.arange(size))


def test_permutations_are_uniform():
    """Each value is as often at each place, and each pair of values in each order, as chance has it."""
    orders = np.stack([epoch_order(10, seed=7, epoch=epoch) for epoch in range(2000)])
    counts = np.stack([np.bincount(place, minlength=10) for place in orders.T])
    assert stats.chisquare(counts.flatten(), ddof=18).pvalue > 1e-3
    neighbours = np.bincount((orders[:, :-1] * 10 + orders[:, 1:]).flatten(), minlength=100).reshape(10, 10)[~np.eye(10, dtype=bool)]
    assert stats.chisquare(neighbours).pvalue > 1e-3
    four = np.unique([epoch_order(4, seed=1, epoch=epoch) for epoch in range(720)], axis=0, return_counts=True)[1]
    assert len(four) == 24 and stats.chisquare(four).pvalue > 1e-3


def test_a_large_order_is_read_anywhere_without_being_made():
    order = Order(np.full(10_000, 10_000), seed=1)
    middle = order.of_epoch(0, 50_000_000, 50_100_000)
    assert len(np.unique(middle)) == len(middle) and middle.min() >= 0 and middle.max() < 10**8
    assert stats.kstest(middle / 1e8, "uniform").pvalue > 1e-3
    assert abs(stats.spearmanr(np.arange(len(middle)), middle).statistic) < 0.01


@given(SHARDS, st.integers(0, 9), st.integers(1, 40), st.integers(0, 60), st.integers(0, 2**64 - 1))
def test_samples_do_not_depend_on_how_they_are_asked_for(rows, window, size, start, seed):
    """Every epoch has each row once, in windows of whole shards; any cut of the sample numbers gives the same rows."""
    order, total = Order(np.array(rows), seed, window), sum(rows)
    rows_B, epochs_B = order.at(0, 3 * total)
    assert np.array_equal(epochs_B, np.repeat([0, 1, 2], total))
    assert all(np.array_equal(np.sort(rows_B[epoch * total : (epoch + 1) * total]), np.arange(total)) for epoch in range(3))
    start %= total
    parts = [Order(np.array(rows), seed, window).at(at, at + size) for at in range(start, start + 3 * size, size)]
    for found, whole in zip(zip(*parts, strict=True), (Order(np.array(rows), seed, window).at(start, start + 3 * size)), strict=True):
        assert np.array_equal(np.concatenate(found), whole)
    assert order.sample(order.place(start)) == start and order.place(total + start).epoch == 1


@given(SHARDS, st.integers(1, 4), st.integers(0, 2**32), st.data())
def test_a_window_holds_the_shards_that_its_samples_still_need_and_no_others(rows, window, seed, data):
    order, total = Order(np.array(rows), seed, window), sum(rows)
    shard_of = np.repeat(np.arange(len(rows)), rows)
    sample = data.draw(st.integers(0, 2 * total - 1))
    epoch, number = order.window_of(sample)
    last = sample
    while order.window_of(last + 1) == (epoch, number):
        last += 1
    needed = order.shards_of(epoch, number, sample % total)
    assert np.array_equal(needed, np.unique(shard_of[order.at(sample, last + 1)[0]])) and len(needed) <= window
    after = order.after(epoch, number)
    while not sum(np.array(rows)[order.shards_of(*after)]):  # windows of empty shards
        after = order.after(*after)
    assert order.window_of(last + 1) == after


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), st.integers(0, 2**32), st.integers(0, 3 * BLOCK - 500))
def test_a_mixture_has_exact_shares_and_takes_each_dataset_in_its_own_order(weights, seed, start):
    quota_D = quotas(weights)
    assert quota_D.sum() == BLOCK and quota_D.min() >= 1
    shares = np.array(weights) / sum(weights) * BLOCK
    assert np.abs(quota_D - shares).max() < len(weights)
    order = MixtureOrder(weights, seed)
    which, number = order.at(start, start + 500)
    for dataset in range(len(weights)):
        first = order.before(start, dataset)
        assert np.array_equal(number[which == dataset], first + np.arange((which == dataset).sum()))
        assert order.before(BLOCK * 2, dataset) == 2 * quota_D[dataset]


def test_a_mixture_shuffles_its_datasets():
    which, _ = MixtureOrder([3, 1], seed=5).at(0, BLOCK)
    assert stats.binomtest(int((which[1:] * which[:-1]).sum()), BLOCK - 1, 1 / 16).pvalue > 1e-3
    assert np.bincount(which[:4096]) / 4096 == pytest.approx([0.75, 0.25], abs=0.03)
