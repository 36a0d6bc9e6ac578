"""Times and masks are functions of the row and the step, whatever the batch around them."""

import torch
from scipy.stats import kstest

from trainer.chance import Chance


def test_times_of_a_global_batch_are_spread_evenly_and_differ_between_steps():
    times = Chance(1, 10, 64).times(torch.arange(64))
    assert (times.sort().values.diff() - 0.999 / 64).abs().max() < 1e-5
    assert not torch.equal(times, Chance(1, 11, 64).times(torch.arange(64)))
    assert torch.equal(times[32:48], Chance(1, 10, 64).times(torch.arange(32, 48)))


def test_masks_depend_on_sequence_and_position_not_on_the_batch():
    chance, ids = Chance(1, 3, 8), torch.arange(100, 108)
    t = torch.linspace(0.1, 0.9, 8)
    whole = chance.masked(ids, t, 16)
    assert torch.equal(whole[2:5], chance.masked(ids[2:5], t[2:5], 16))
    assert not torch.equal(whole, Chance(1, 4, 8).masked(ids, t, 16))
    assert not torch.equal(whole, Chance(2, 3, 8).masked(ids, t, 16))


def test_a_position_is_masked_with_the_probability_of_its_rows_time():
    rows = 4000
    masked = Chance(7, 1, rows).masked(torch.arange(rows), torch.full((rows,), 0.3), 8).float()
    assert (masked.mean(0) - 0.3).abs().max() < 4 * (0.3 * 0.7 / rows) ** 0.5
    assert abs(float(torch.corrcoef(masked.T)[0, 1])) < 4 / rows**0.5


def test_fresh_noise_is_gumbel_and_new_in_every_step():
    from noise.philox import gumbel

    ids, position = torch.arange(500), torch.ones(500, dtype=torch.int64)
    first = gumbel(Chance(1, 1, 8).fresh_rows(ids, position), 8)
    second = gumbel(Chance(1, 2, 8).fresh_rows(ids, position), 8)
    assert not torch.equal(first, second)
    for g in (first, second):
        assert kstest(g.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1])) < 0.06
