"""Writing block by block draws from the law that it states, with the cache or without, to any length."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.blocks import sample_blocks
from eval.config import SampleConfig
from eval.decoding import Decoding, choose
from eval.sample_set import sample_set
from eval.sampler import blank_rows, resolve_output, sampling_noise
from eval.stream import OUTPUT_DRAW, step_seed, stream_uniform
from noise import philox
from tests.eval.known import BlockTable, TableStudent, fits
from tests.eval.world import write_tokenizer
from trainer.conditioning import KnownNoise
from trainer.config import NoiseConfig, StudentConfig
from trainer.students import build, save_student

V = 11


def by_blocks(student: BlockTable) -> torch.Tensor:
    """Each block's tokens independent given the blocks before: probability of each of `student.words`."""
    p_W = torch.ones(len(student.words), dtype=torch.float64)
    for start in range(0, student.unknown + 1, student.block_size):
        known = student.words.clone()
        known[:, max(0, start - 1) :] = student.mask_id
        conditional = student.conditionals(known)
        for position in range(max(1, start), min(start + student.block_size, student.unknown + 1)):
            p_W = p_W * conditional[torch.arange(len(p_W)), position - 1, student.words[:, position - 1]]
    return p_W


def drawn(student: BlockTable, decoding: Decoding, rows: int = 20_000) -> torch.Tensor:
    return sample_blocks(student, blank_rows(student, rows, student.unknown + 1, 0), torch.arange(rows), 5, decoding).ids_BL[:, 1:]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_one_token_a_step_is_the_joint_and_one_step_a_block_its_product_given_the_blocks_before(size: int) -> None:
    student = BlockTable(size)
    assert fits(drawn(student, Decoding(sampler="first_hitting")), student, student.joint)
    assert fits(drawn(student, Decoding(1)), student, by_blocks(student))
    assert (size == 1) == torch.allclose(by_blocks(student), student.joint)
    assert torch.equal(drawn(student, Decoding(sampler="first_hitting"), 300), drawn(student, Decoding(size + 7), 300))


def test_argmax_of_a_perfect_readout_is_a_sample_with_noise_held_or_fresh() -> None:
    student = BlockTable(3, noise="gumbel", readout=True)
    for fresh in (False, True):
        assert fits(drawn(student, Decoding(4, output="argmax", fresh_noise=fresh)), student, student.joint)


@pytest.mark.parametrize("fresh", [False, True])
def test_noise_is_held_through_a_blocks_steps_or_new_in_each_and_scaled_by_its_temperature(fresh: bool) -> None:
    student, rows = BlockTable(2, unknown=5, noise="gumbel"), torch.arange(7)
    ids_BL = blank_rows(student, 7, 6, bos=0)
    ids_BL[:, 1] = 0  # given, so that each of the other two blocks takes both of its steps
    sample_blocks(student, ids_BL, rows, 9, Decoding(2, noise_temperature=0.5, fresh_noise=fresh))
    for step, asked, given_g in zip((0, 1, 0, 1), student.asked, student.given, strict=True):
        all_g = torch.zeros(7, 6, 3)
        unknown = ids_BL == student.mask_id
        all_g[unknown] = 0.5 * sampling_noise(step_seed(9, step) if fresh else 9, rows, unknown, 3)
        assert given_g is not None and torch.equal(given_g, all_g[:, : asked.shape[1]][asked == student.mask_id])


def test_confidence_reveals_the_surest_position_of_a_block_first() -> None:
    student = BlockTable(3, unknown=5)
    sample_blocks(student, blank_rows(student, 40, 6, bos=0), torch.arange(40), 1, Decoding(3, order="confidence"))
    steps = [pair for pair in itertools.pairwise(student.asked) if pair[0].shape == pair[1].shape]
    assert len(steps) == 3
    for before, after in steps:
        masked = before[:, 1:] == student.mask_id
        sure = student.conditionals(before[:, 1:])[:, : masked.shape[1]].amax(-1).masked_fill(~masked, 0)
        revealed = masked & (after[:, 1:] != student.mask_id)
        assert (revealed.sum(1) == 1).all() and torch.equal(revealed.int().argmax(1), sure.argmax(1))


@given(
    st.integers(1, 9),
    st.integers(1, 8),
    st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4),
    st.sampled_from(["even", "ancestral", "first_hitting"]),
    st.sampled_from(["random", "confidence", "left_to_right"]),
)
def test_every_block_is_written_whole_whatever_its_size_and_steps(nfe: int, size: int, known: list[list[bool]], sampler: str, order: str) -> None:
    student = BlockTable(size, vocab_size=2, unknown=7)
    own = sampler == "first_hitting"
    decoding = Decoding(0 if own else nfe, order="random" if own else order, sampler=sampler)  # type: ignore[arg-type]
    ids_BL = blank_rows(student, len(known), 8, bos=1)
    ids_BL[:, 1:][torch.tensor(known)] = 1
    found = sample_blocks(student, ids_BL, torch.arange(len(known)), 3, decoding)
    unknown = ids_BL == student.mask_id
    assert not (found.ids_BL == student.mask_id).any() and torch.equal(found.ids_BL[~unknown], ids_BL[~unknown])
    unknown_BC = torch.stack([part.sum(1) for part in unknown.split(size, 1)], 1)
    most = (unknown_BC if own else unknown_BC.clamp_max(nfe)).sum(1)
    assert torch.equal(found.nfe_B, most) if sampler != "ancestral" else bool((found.nfe_B <= most).all() and ((found.nfe_B > 0) == (most > 0)).all())
    alone = sample_blocks(student, ids_BL[-1:], torch.tensor([len(known) - 1]), 3, decoding)
    assert torch.equal(alone.ids_BL[0], found.ids_BL[-1]) and alone.nfe_B[0] == found.nfe_B[-1]


KNOWN = NoiseConfig("gumbel", "replace", readout=True, known=True)
EVERYTHING = NoiseConfig("gumbel", "add", readout=True, drafts=[1], draft_restart=True)


def student_of(size: int, length: int, noise: NoiseConfig | None = None, shift: bool = False) -> Any:
    """An untrained float64 student whose choices differ from position to position."""
    torch.manual_seed(1)
    student = build(StudentConfig(kind="bd3lm", layers=2, hidden=16, heads=2, block_size=size, shift=shift, noise=noise or NoiseConfig()), V, length)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "norm" not in name:
                weight.add_(0.4 * torch.randn_like(weight))
    return student.double().eval()


class Slow:
    """The same student without its cache."""

    def __init__(self, student: Any):
        self._student = student
        for name in ("vocab_size", "mask_id", "noise", "block_size", "block_length"):
            setattr(self, name, getattr(student, name))

    def empty_cache(self) -> Any:
        return self

    def keep_rows(self, row_R: torch.Tensor) -> None:
        pass

    filled = 0

    def logits(self, ids_BT: torch.Tensor, g_NV: torch.Tensor | None, length_B: torch.Tensor | None, cache: Any, **known: Any) -> torch.Tensor:
        return self._student.logits(ids_BT, None if g_NV is None else g_NV.double(), length_B, **doubled(known))


def doubled(known: dict[str, KnownNoise]) -> dict[str, KnownNoise]:
    return {name: replace(noise, g_KV=noise.g_KV.double()) for name, noise in known.items()}  # type: ignore[union-attr]


class Doubled(Slow):
    """With its cache, and noise in float64."""

    def empty_cache(self) -> Any:
        return self._student.empty_cache()

    def logits(self, ids_BT: torch.Tensor, g_NV: torch.Tensor | None, length_B: torch.Tensor | None, cache: Any, **known: Any) -> torch.Tensor:
        return self._student.logits(ids_BT, None if g_NV is None else g_NV.double(), length_B, cache, **doubled(known))


@pytest.mark.parametrize(
    "noise", [NoiseConfig(), EVERYTHING, NoiseConfig("gaussian", "replace"), KNOWN], ids=lambda noise: f"{noise.kind}-{noise.known}"
)
@pytest.mark.parametrize(("size", "shift"), [(1, False), (3, True), (4, False), (9, True)])
def test_the_cache_changes_no_token_and_a_seed_names_a_text_at_any_batch_size(noise: NoiseConfig, size: int, shift: bool) -> None:
    student = student_of(size, 9, noise, shift)
    decoding = Decoding(2, output=resolve_output("auto", student), noise_temperature=0.8 if noise.kind != "none" else 1.0)
    length_B = torch.tensor([9, 9, 5, 9, 7])

    def rows(of: Any, which: torch.Tensor, seed: int = 1) -> torch.Tensor:
        ids_BL = blank_rows(student, 5, 9, bos=0).masked_fill(torch.arange(9) >= length_B[:, None], 0)
        ids_BL[1, 4:6] = 2  # given, inside
        at = {int(row): number for number, row in enumerate(which)}
        given = KnownNoise(torch.tensor([at[1] * 9 + 4]), told_1V) if noise.known and 1 in at else None
        return sample_blocks(of, ids_BL[which], which, seed, decoding, length_B=length_B[which], given=given).ids_BL

    every, told_1V = torch.arange(5), 5 * torch.randn(1, V, generator=torch.Generator().manual_seed(1))
    whole = rows(Slow(student), every)
    assert torch.equal(rows(Doubled(student), every), whole) and whole[1, 4:6].tolist() == [2, 2]
    assert torch.equal(rows(Doubled(student), torch.tensor([3, 1])), whole[[3, 1]])
    assert torch.equal(rows(Doubled(student), torch.tensor([2])), whole[[2]])
    assert not torch.equal(rows(Doubled(student), every, seed=2), whole)


@pytest.mark.parametrize(("shift", "keep"), [(False, None), (True, 1)])
def test_past_the_training_length_a_window_slides(shift: bool, keep: int | None) -> None:
    """A naive loop: for each block of one step the window's tokens, BOS first, with the noise of the text's own positions."""
    student = student_of(2, 8, EVERYTHING, shift)
    length, which, kept = 17, torch.arange(3), (keep or 2) * 2
    found = sample_blocks(Doubled(student), blank_rows(student, 3, length, bos=0), which, 4, Decoding(1, output="argmax"), keep=keep)
    ids, first = blank_rows(student, 3, length, bos=0), 0
    for start in range(0, length, 2):
        stop = min(start + 2, length)
        if stop - first > 8:
            first = start - kept
        unknown = (ids == student.mask_id) & (torch.arange(length) < stop)
        window = torch.cat((ids[:, :1], ids[:, first + 1 : stop]), 1)
        logits = student.logits(window, sampling_noise(4, which, unknown, V).double())
        ids[unknown] = logits.argmax(1)
    assert torch.equal(found.ids_BL, ids)
    assert found.nfe_B.tolist() == [9, 9, 9]
    with pytest.raises(ValueError, match="no context to slide with"):
        sample_blocks(student_of(5, 8), blank_rows(student, 1, 9, 0), torch.arange(1), 1, Decoding(1))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("length", [8, 17])
def test_known_tokens_have_the_noise_that_wrote_them_also_where_a_window_slides(shift: bool, length: int) -> None:
    """A naive loop without a cache: a written token with its own noise, a given one with what is told of it, BOS and what it replaces with none."""
    student, which, decoding = (
        student_of(2, 8, KNOWN, shift),
        torch.arange(3),
        Decoding(2, output="argmax", noise_temperature=0.7, order="left_to_right"),
    )
    student.input.known_scale.data.mul_(8)
    start_BL = blank_rows(student, 3, length, bos=0)
    start_BL[1, 3], start_BL[2, 5] = 4, 6
    given = KnownNoise(torch.tensor([length + 3]), 5 * torch.randn(1, V, generator=torch.Generator().manual_seed(1)))  # of row 1; row 2's has none
    found = sample_blocks(Doubled(student), start_BL, which, 4, decoding, given=given)
    assert not torch.equal(found.ids_BL[1], sample_blocks(Doubled(student), start_BL, which, 4, decoding).ids_BL[1])
    for row in range(3):
        ids_L, first = start_BL[row].clone(), 0
        g_LV = 0.7 * sampling_noise(4, torch.tensor([row]), torch.ones(1, length, dtype=torch.bool), V).double()
        has_L = start_BL[row] == student.mask_id
        if row == 1:
            g_LV[3], has_L[3] = given.g_KV[0].double(), True
        for at in range(1, length):
            if ids_L[at] != student.mask_id:
                continue
            stop = min(at // 2 * 2 + 2, length)
            first = first if stop - first <= 8 else at // 2 * 2 - 4
            window_1T = torch.cat((ids_L[:1], ids_L[first + 1 : stop]))[None]
            place_K = ((window_1T[0] != student.mask_id) & (torch.arange(stop - first) > 0) & has_L[first:stop]).nonzero()[:, 0]
            masked_N = (window_1T[0] == student.mask_id).nonzero()[:, 0]
            logits_NV = student.logits(window_1T, g_LV[first + masked_N], known=KnownNoise(place_K, g_LV[first + place_K]))
            ids_L[at] = logits_NV[0].argmax()
        assert torch.equal(found.ids_BL[row], ids_L)


def test_a_row_ends_at_the_first_eos_that_it_writes_after_its_given_tokens() -> None:
    student, eos, rows = student_of(3, 12), 7, torch.arange(60)
    ids_BL = blank_rows(student, 60, 12, bos=eos)
    ids_BL[:5, 6] = eos  # a given EOS ends nothing, and no row ends before it
    decoding = Decoding(2, temperature=2.0)
    endless, ended = (sample_blocks(Doubled(student), ids_BL, rows, 3, decoding, eos=stop) for stop in (None, eos))
    lengths = []
    for row in range(60):
        written = [t for t in range(1, 12) if int(endless.ids_BL[row, t]) == eos and t > (6 if row < 5 else 0)]
        length = written[0] + 1 if written else 12
        assert torch.equal(ended.ids_BL[row, :length], endless.ids_BL[row, :length]) and not ended.ids_BL[row, length:].any()
        assert int(ended.nfe_B[row]) == sum(
            min(2, stop - max(1, stop - 3) - (row < 5 and stop == 9)) for stop in range(3, -(-length // 3) * 3 + 1, 3)
        )
        lengths.append(length)
    assert ended.length_B.tolist() == lengths and len(set(lengths)) > 4


def test_uniforms_and_noise_are_the_streams_at_the_texts_own_positions() -> None:
    student = BlockTable(2, noise="gumbel")
    found = sample_blocks(student, blank_rows(student, 6, 5, 0), torch.arange(6) + 40, 8, Decoding(1)).ids_BL
    for start, stop in ((0, 2), (2, 4), (4, 5)):
        ids = torch.cat((found[:, :start], blank_rows(student, 6, stop, 0)[:, start:]), 1)
        row, position = (ids == student.mask_id).nonzero(as_tuple=True)
        uniform = stream_uniform(philox.rows(8, row + 40, position, OUTPUT_DRAW))
        assert torch.equal(found[row, position], choose(student.logits(ids, None), uniform, Decoding(1)))


def test_given_noise_is_used_where_it_belongs() -> None:
    student = student_of(2, 8, EVERYTHING)
    ids_BL = blank_rows(student, 3, 8, 0)
    ids_BL[1, 3] = 4
    unknown, decoding = ids_BL == student.mask_id, Decoding(2, output="argmax")
    own = sample_blocks(Doubled(student), ids_BL, torch.arange(3), 6, decoding)
    handed = sample_blocks(Doubled(student), ids_BL, torch.arange(3), 6, decoding, g_MV=sampling_noise(6, torch.arange(3), unknown, V))
    assert torch.equal(own.ids_BL, handed.ids_BL)


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"sampler": "adaptive"}, {}, "takes whole rows"),
        ({"nfe": 1, "noise_temperature": 0.9}, {}, "takes no noise"),
        ({"nfe": 1, "fresh_noise": True}, {}, "takes no noise"),
        ({"nfe": 1}, {"keep": 1}, "no window slides"),
        ({"nfe": 1}, {"keep": 9, "length": 12}, "keeps 1 to 3 blocks"),
        ({"nfe": 1}, {"bos": V}, "position 0 of a row is masked"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], more: dict[str, Any], message: str) -> None:
    student = student_of(2, 8)
    ids_BL = blank_rows(student, 1, more.pop("length", 8), more.pop("bos", 0))
    with pytest.raises(ValueError, match=message):
        sample_blocks(student, ids_BL, torch.arange(1), 1, Decoding(**settings), **more)


def test_every_text_of_a_student_with_blocks_of_one_has_its_own_likelihood() -> None:
    """The sampler and the loss are the same distribution: counts of all texts against exp(-NLL)."""
    torch.manual_seed(0)
    student = build(StudentConfig(kind="bd3lm", layers=1, hidden=8, heads=2, block_size=1), 3, 4).eval()
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.5 * torch.randn_like(weight))
        words = torch.tensor([(0, *word) for word in itertools.product(range(3), repeat=3)])
        log_p = torch.zeros(27, dtype=torch.float64)
        for t in range(1, 4):
            ids = torch.cat((words[:, :t], torch.full((27, 1), 3)), 1)
            log_p += student.logits(ids).log_softmax(-1).gather(1, words[:, t : t + 1])[:, 0].double()
    ids = sample_blocks(student, blank_rows(student, 20_000, 4, 0), torch.arange(20_000), 2, Decoding(1)).ids_BL
    assert fits(ids[:, 1:], TableStudent(3, 3), log_p.exp())


def test_the_command_writes_blocks_to_any_length_with_prompts_and_an_end(tmp_path: Path) -> None:
    student = student_of(2, 8, EVERYTHING).float()
    save_student(tmp_path / "student", student, student.own_state(), {}, {"dataset": ""})
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "prompts.jsonl").write_text('{"ids": [9, null, null, 10]}\n{"ids": []}')
    settings = {"student": str(tmp_path / "student"), "output": str(tmp_path), "tokenizer": str(tmp_path / "tokenizer"), "device": "cpu"}
    config = SampleConfig(**settings, prompts=str(tmp_path / "prompts.jsonl"), length=19, eos=5, keep_blocks=1, sequences=7, nfe=1, batch=3)
    columns = sample_set(config).columns
    ids_BL = blank_rows(student, 7, 19, 0)
    ids_BL[::2, [1, 4]] = torch.tensor([9, 10])
    ids_BL[::2, 5:] = 0  # a row with blanks inside ends with its last token
    length_B = torch.tensor([5, 19] * 4)[:7]
    found = sample_blocks(student, ids_BL, torch.arange(7), 1, Decoding(1, output="argmax"), length_B=length_B, eos=5, keep=1)
    for name, column in (("input_ids", found.ids_BL), ("length", found.length_B), ("nfe", found.nfe_B)):
        assert columns[name].tolist() == column.tolist()
    with pytest.raises(ValueError, match="does not write in blocks"):
        plain = build(StudentConfig(layers=1, hidden=8, heads=2), V, 8)
        save_student(tmp_path / "plain", plain, plain.own_state(), {}, {})
        sample_set(SampleConfig(**{**settings, "student": str(tmp_path / "plain")}, eos=5))
    with pytest.raises(ValueError, match="without a small model"):
        sample_set(SampleConfig(**settings, auxiliary="judge"))
    with pytest.raises(ValueError, match="eos is 11, not a token of the student's vocabulary of 11"):
        sample_set(SampleConfig(**settings, eos=V))
    with pytest.raises(ValueError, match="eos is -2; give a token, or -1"):
        SampleConfig(**settings, eos=-2)
