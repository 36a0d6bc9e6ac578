"""Block diffusion against slow references: who sees whom, the loss block by block, exact likelihoods, the cache, the clipped rates."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.chain import write_chain
from tests.trainer.test_students import EVERYTHING, OPTIONS
from trainer.attention import attend
from trainer.chance import Chance
from trainer.config import NoiseConfig, ObjectiveConfig, StudentConfig
from trainer.data import NoiseDataset
from trainer.initialise import start_from
from trainer.layout import layout
from trainer.students import build, load_student, save_student

V, L = 13, 8
CPU = torch.device("cpu")
RESTART = NoiseConfig(kind="gumbel", input="replace", projection="tied", readout=True, drafts=[1], draft_restart=True)
NOISES = {"none": NoiseConfig(), "everything": EVERYTHING, "restart": RESTART}


def student_of(block_size: int, noise: NoiseConfig | None = None, kind: str = "bd3lm", vocab: int = V, length: int = L, **more):
    """A float64 student whose weights are large enough that every path matters."""
    torch.manual_seed(3)
    blocks = {"block_size": block_size} if kind == "bd3lm" else {}
    student = build(StudentConfig(kind=kind, layers=2, hidden=16, heads=2, noise=noise or NoiseConfig(), **blocks, **more), vocab, length)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "norm" not in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return student.double()


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    return NoiseDataset(write_chain(tmp_path_factory.mktemp("chain") / "dataset", ragged=True)).batch(np.arange(24))


@given(st.integers(1, 11), st.integers(1, 12), st.booleans())
def test_everyone_sees_its_own_block_and_the_clean_blocks_before_it(length, block_size, shift):
    slots = layout(length, block_size, shift, CPU)
    who = list(zip(slots.position_M.tolist(), slots.noised_M.tolist(), slots.from_noised_M.tolist(), strict=True))
    noised = [position for position, in_noised, own in who if in_noised and own]
    assert noised == list(range(length))  # each position once
    last = (length - 1) // block_size * block_size
    assert [position for position, in_noised, _ in who if not in_noised] == list(range(last))  # nobody needs the last clean block
    leads = [position for position, in_noised, own in who if in_noised and not own]
    assert leads == (list(range(block_size - 1, length - 1, block_size)) if shift else [])
    for (query, key), seen in zip(itertools.product(who, who), slots.seen_MM.flatten().tolist(), strict=True):
        q_block, k_block = ((position + (noisy and not own)) // block_size for position, noisy, own in (query, key))
        if key[1]:
            assert seen == (query[1] and q_block == k_block)
        else:
            assert seen == (k_block < q_block or (k_block == q_block and not query[1]))


@pytest.mark.filterwarnings("ignore:.*torch.compile.flex_attention.*")
def test_flex_attention_has_the_mask_of_sdpa():
    slots = layout(16, 5, True, CPU)
    q, k, v = torch.randn(3, 4, 2, len(slots.position_M), 16).unbind(0)
    for length_B in (None, torch.tensor([16, 3, 11, 7])):
        expected = attend(q, k, v, slots.mask(length_B))
        assert torch.allclose(attend(q, k, v, slots.mask(length_B, flex=True)), expected, atol=1e-5)


def slow_loss(student, batch, chance) -> float:
    """Every row and block alone: clean blocks before it, the block with its masks, nothing after it and no padding."""
    size, expected = student.block_size, 0.0
    rates = chance.rates(batch.place_B, -(-L // size), *student.rates())
    masked = chance.masked(batch.sequence_id_B, rates.repeat_interleave(size, 1)[:, :L], L) & batch.valid_BL
    where = masked.flatten().nonzero()[:, 0]
    g = torch.zeros(masked.numel(), V)
    noise = student._noise(batch, chance, where, None)
    if noise is not None:
        g[where] = noise.dense()
    for row, block in itertools.product(range(len(masked)), range(rates.shape[1])):
        stop = min((block + 1) * size, int(batch.length_B[row]))
        hidden = masked[row].clone()
        hidden[: block * size] = False
        hidden[stop:] = False
        if not hidden.any():
            continue
        ids = batch.input_ids_BL[row].masked_fill(hidden, V)[None, :stop]
        logits = student.logits(ids, g.view(len(masked), L, V)[row][hidden] if noise is not None else None, cache=student.empty_cache())
        token = batch.input_ids_BL[row][hidden]
        expected -= float((logits.log_softmax(-1)[torch.arange(len(token)), token] / rates[row, block]).sum())
    return expected


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("size", "shift"), [(1, True), (3, False), (3, True), (8, True)])
def test_one_forward_over_both_halves_is_every_block_run_alone(batch, noise, size, shift):
    student = student_of(size, NOISES[noise], shift=shift, clip=(0.3, 0.9)).float().train()
    with torch.no_grad():
        chance = Chance(3, 5, 24)
        _, figures = student(batch, chance)
        assert float(figures["nelbo"]) == pytest.approx(slow_loss(student, batch, chance), rel=1e-5)
        assert sum(float(student(part, chance)[1]["nelbo"]) for part in batch.split(7)) == pytest.approx(float(figures["nelbo"]), rel=1e-5)


@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.4, 0.9)])
@pytest.mark.parametrize("noise", [*NOISES, "token_kd"])
def test_one_block_over_the_row_is_mdlm(batch, noise, clip):
    options = {"clip": clip} | ({"objective": ObjectiveConfig(token_kd=0.5)} if noise == "token_kd" else {"noise": NOISES[noise]})
    ours, theirs = student_of(L, **options).float().train(), student_of(0, kind="mdlm", **options).float().train()
    assert theirs.rates() == ours.rates() == (max(clip[0], 1e-3), clip[1]) and theirs.eval().rates() == (1e-3, 1.0)
    theirs.train()
    theirs.load_state_dict(ours.state_dict())
    chance = Chance(3, 5, 24)
    (loss, figures), (expected, their_figures) = ours(batch, chance), theirs(batch, chance)
    assert torch.equal(loss, expected) and figures.keys() == their_figures.keys() == set(ours.figure_names)
    assert all(torch.equal(figures[name], their_figures[name]) for name in figures)


def every_row(vocab: int, length: int) -> torch.Tensor:
    return torch.tensor([(0, *tail) for tail in itertools.product(range(vocab), repeat=length - 1)])


def clean_batch(batch, ids):
    rows = len(ids)
    nought = torch.zeros(rows, dtype=torch.int64)
    places = {name: torch.arange(rows) for name in ("sequence_id_B", "place_B")}
    return replace(batch, input_ids_BL=ids, length_B=nought + ids.shape[1], seed_B=nought, draw_B=nought, padded=False, **places)


@pytest.mark.parametrize("shift", [False, True])
def test_blocks_of_one_position_are_an_exact_likelihood(batch, shift):
    student = student_of(1, vocab=3, length=5, shift=shift).eval()
    rows = every_row(3, 5)
    with torch.no_grad():
        nll = torch.stack([student(clean_batch(batch, row[None]), Chance(1, 0, 1))[0] for row in rows])
        assert float((-nll).exp().sum()) == pytest.approx(1.0, abs=1e-9)  # a distribution over all texts
        chain = torch.zeros(len(rows), dtype=torch.float64)
        for t in range(1, 5):
            ids = torch.cat((rows[:, :t], torch.full((len(rows), 1), 3)), 1)
            chain -= student.logits(ids).log_softmax(-1).gather(1, rows[:, t : t + 1])[:, 0]
    assert torch.allclose(nll, chain, atol=1e-9)


def test_the_bound_is_the_mean_likelihood_over_all_orders_within_blocks(batch):
    """Over rates and masks the bound's mean is that, over orders, of the NLL of writing each block one token at a time."""
    student, row = student_of(3, vocab=3, length=6).eval(), torch.tensor([[0, 2, 1, 1, 0, 2]])
    with torch.no_grad():
        exact = 0.0
        for start in (0, 3):
            unknown = [t for t in range(start, start + 3) if t]
            orders = list(itertools.permutations(unknown))
            for order in orders:
                ids = row[:, : start + 3].clone()
                ids[:, unknown] = 3
                for t in order:
                    at = sorted(u for u in unknown if ids[0, u] == 3).index(t)
                    exact -= float(student.logits(ids).log_softmax(-1)[at, row[0, t]]) / len(orders)
                    ids[0, t] = row[0, t]
        rows = 20_000
        estimate = float(student(clean_batch(batch, row.expand(rows, -1).contiguous()), Chance(1, 0, rows))[0]) / rows
    assert estimate == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shift", [False, True])
def test_every_noise_option_trains_all_weights_and_is_seen_by_its_own_block_alone(batch, name, shift):
    student = student_of(4, OPTIONS[name], shift=shift)
    student.float()(batch, Chance(1, 1, 24))[0].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    ids = batch.input_ids_BL[:2]
    noised = ids.clone()
    noised[:, [2, 3, 5, 6]] = V
    g = torch.randn(8, V)
    loud = g.clone()
    loud[2, 4] += 5.0  # position 5 of the first row, in its second block
    with torch.no_grad():
        quiet, changed = student.predict(noised, ids, g)[0], student.predict(noised, ids, loud)[0]
    same = torch.isclose(quiet, changed, atol=1e-6).all(1)
    assert same.tolist()[:2] == [True, True] and not same[2] and same[4:].all()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("size", "shift", "backbone"),
    [(1, False, "llama"), (1, True, "llama"), (3, False, "llama"), (3, True, "dit"), (4, True, "llama"), (8, False, "llama")],
)
def test_cached_blocks_give_the_logits_of_the_whole_forward(noise, size, shift, backbone):
    student = student_of(size, NOISES[noise], shift=shift, backbone=backbone).eval()
    ids = torch.randint(0, V, (3, L))
    cache = student.empty_cache()
    with torch.no_grad():
        for start in range(0, L, size):
            if start == size < 4:
                continue  # a block that was given whole: it goes into the cache with the next
            stop = min(start + size, L)
            for hidden in (range(max(1, start), stop), range(stop - 1, stop)):  # two steps of the same block
                so_far = ids[:, :stop].clone()
                so_far[:, list(hidden)] = V
                if not hidden or stop == 1:
                    continue
                g = torch.randn(3 * len(hidden), V).double() if student.noise.kind != "none" else None
                whole, cached = student.logits(so_far, g), student.logits(so_far, g, cache=cache)
                assert cached.dtype == torch.float64 and torch.allclose(cached, whole, rtol=0, atol=1e-11)
    assert cached is not None and cache.filled == (L - 1) // size * size


def test_rows_can_leave_a_cache():
    student, ids = student_of(2, EVERYTHING).eval(), torch.randint(0, V, (4, 6))
    ids[:, 4:] = V
    g, cache, kept = torch.randn(8, V).double(), student.empty_cache(), torch.tensor([3, 1])
    with torch.no_grad():
        student.logits(ids, g, cache=cache)
        cache.keep_rows(kept)
        rest = g.view(4, 2, V)[kept].flatten(0, 1)
        assert torch.allclose(student.logits(ids[kept], rest, cache=cache), student.logits(ids[kept], rest), rtol=0, atol=1e-11)


def test_flex_is_refused_in_training_on_a_cpu(batch):
    with pytest.raises(ValueError, match="no backward pass on CPU"):
        student_of(4, attention="flex")(batch, Chance(1, 1, 24))


def test_masks_in_several_blocks_of_a_row_are_refused():
    student = student_of(4)
    with pytest.raises(ValueError, match="fill the earlier blocks first"):
        student.logits(torch.tensor([[0, 1, V, 1, 1, V, 1, 1]]))
    student.logits(torch.tensor([[0, 1, V, V, 1, 1, 1, 1], [0, 1, 1, 1, 1, V, 1, 1]]))  # one block a row


@pytest.mark.parametrize("informed", [False, True])
def test_the_second_stage_starts_from_an_mdlm_checkpoint_with_noise_or_without(tmp_path, informed):
    first = student_of(0, EVERYTHING if informed else None, kind="mdlm").float()
    save_student(tmp_path, first, first.state_dict(), {}, {})
    with_noise, without = student_of(4, EVERYTHING).float(), student_of(4).float()
    said = start_from(with_noise, tmp_path) + start_from(without, tmp_path)
    own, theirs = with_noise.state_dict(), first.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    assert all(torch.equal(without.state_dict()[name], own[name]) for name in without.state_dict())  # the matched start
    assert any("readout.scale.weight" in line for line in said)  # kept its initial value there, or unused here


def test_a_saved_student_loads_equal(tmp_path):
    student = student_of(3, EVERYTHING, shift=True, clip_search=True).float().eval()
    student.clip.copy_(torch.tensor([0.25, 0.75]))
    save_student(tmp_path, student, student.own_state(), {}, {})
    loaded = load_student(tmp_path)
    ids, g = torch.tensor([[0, 4, 5, V, V]]), torch.randn(2, V)
    assert torch.equal(student.logits(ids, g), loaded.logits(ids, g))
    assert loaded.block_size == 3 and loaded.train().rates() == (0.25, 0.75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "a bd3lm student needs 1 to 8"),
        ({"block_size": 9}, "student.block_size is 9"),
        ({"clip": (0.6, 0.4)}, "beta <= omega"),
        ({"clip": (0.0, 0.0)}, "omega above 0"),
        ({"block_size": 1, "clip_search": True}, "no variance at mask rate 1"),
        ({"kind": "mdlm"}, "only student.kind bd3lm reads"),
        ({"kind": "mdlm", "block_size": 0, "attention": "sdpa"}, "only student.kind bd3lm reads"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build(StudentConfig(**{"kind": "bd3lm", "layers": 2, "hidden": 16, "heads": 2, "block_size": 4, **change}), V, L)
