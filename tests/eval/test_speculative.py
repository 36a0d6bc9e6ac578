"""A drafter's guesses and a referee: the teacher's own sample whatever the drafter, its own distribution without noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.causal import CausalLM, FromLogits
from eval.decoding import Decoding, restricted_log_probs
from eval.drafters import CausalDrafter, drafter_of
from eval.referee import Held, Rejection, Rule, SharedNoise, prior
from eval.speculative import Drafter, Nobody, Rows, Written, speculate
from eval.stream import NOISE_DRAW
from noise import philox
from noise.storage import DatasetError
from pipeline.generate import write
from tests.eval.known import fits_counts
from tests.eval.world import write_causal
from trainer.conditioning import KnownNoise
from trainer.config import MedusaConfig, NoiseConfig, StudentConfig
from trainer.students import build

V, L, BLOCK, SEED, ROWS = 13, 11, 4, 5, 6
INPUT = NoiseConfig(kind="gumbel", input="replace")
EVERYTHING = NoiseConfig(kind="gumbel", input="add", prior="unigram", readout=True, drafts=[1, 2])
KNOWN = NoiseConfig(kind="gumbel", input="replace", readout=True, known=True)
NONE = NoiseConfig()
GIVEN_B = torch.tensor([1, 3, 1, 2, 5, 1])
LIMIT_B = torch.tensor([11, 11, 7, 9, 11, 2])
GIVEN_BP = torch.randint(1, V, (ROWS, 5), generator=torch.Generator().manual_seed(2))
PLAIN = Decoding(1)


class Oracle:
    """Drafts from a text that is handed to it."""

    most, span, reads_hidden, forwards = 10**6, 0, False, 0

    def __init__(self, text_BL: torch.Tensor):
        self.text_BL = text_BL

    def begin(self) -> None: ...

    def keep(self, at_K: torch.Tensor) -> None: ...

    def draft(self, rows: Rows, room_A: torch.Tensor, rule: Any) -> torch.Tensor:
        for a, (row, known, room) in enumerate(zip(rows.row_A.tolist(), rows.known_A.tolist(), room_A.tolist(), strict=True)):
            rows.ids_AL[a, known : known + room] = self.text_BL[row, known : known + room]
        return room_A


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accept")
    write_causal(folder / "teacher", 1, vocab_size=V)
    write_causal(folder / "other", 2, vocab_size=V)
    write_causal(folder / "tiny", 3, vocab_size=3)
    write_causal(folder / "tiny-other", 4, vocab_size=3)
    return folder


def student(folder: Path, kind: str, noise: NoiseConfig = NONE, vocab_size: int = V, length: int = L, backbone: str = "", **more: Any) -> Any:
    """Untrained, with weights that are large enough to have opinions."""
    shape = {"medusa": MedusaConfig(backbone=str(folder / backbone), heads_count=3)} if kind == "medusa" else {"layers": 2, "hidden": 16, "heads": 2}
    torch.manual_seed(0)
    module = build(StudentConfig(kind, noise=noise, **shape, **more), vocab_size, length)  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return module.eval()


def make(folder: Path, name: str, teacher: CausalLM, noise: NoiseConfig, vocab_size: int = V, length: int = L) -> Drafter:
    def made(kind: str, nfe: int = 1, sight: int = 0, **more: Any) -> Drafter:
        module = student(folder, kind, noise, vocab_size, length, **more)
        sha256 = student(folder, kind, NONE, vocab_size, length, **more).base.weights_sha256 if name == "medusa" else ""
        return drafter_of(module, nfe, sight, sha256)

    own = Path(teacher.name).name
    return {
        "mdlm": lambda: made("mdlm"),
        "mdlm in two forwards": lambda: made("mdlm", 2),
        "mdlm of short sight": lambda: made("mdlm", 1, 3),
        "bd3lm": lambda: made("bd3lm", block_size=3),
        "bd3lm in two forwards": lambda: made("bd3lm", 2, block_size=2, shift=True),
        "mtp": lambda: made("mtp", predict=min(3, length - 1)),
        "medusa": lambda: made("medusa", backbone=own),
        "medusa on another": lambda: made("medusa", backbone=f"{own}-other" if own == "tiny" else "other"),
        "ar": lambda: CausalDrafter(CausalLM(str(folder / (f"{own}-other" if own == "tiny" else "other")))),
        "nobody": Nobody,
    }[name]()


NAMES = [
    "mdlm",
    "mdlm in two forwards",
    "mdlm of short sight",
    "bd3lm",
    "bd3lm in two forwards",
    "mtp",
    "medusa",
    "medusa on another",
    "ar",
    "nobody",
]


def sequential(teacher: CausalLM, decoding: Decoding) -> torch.Tensor:
    """Token by token."""
    ids_BL = write(teacher, FromLogits(decoding), SEED, torch.arange(ROWS), GIVEN_BP, GIVEN_B, L, NOISE_DRAW)[0]
    return ids_BL.masked_fill(torch.arange(L) >= LIMIT_B[:, None], 0)


def shared(decoding: Decoding, sequence_id_B: torch.Tensor, span: int) -> SharedNoise:
    held = Held(prior(SEED, sequence_id_B, V), len(sequence_id_B), span, V, torch.device("cpu"))
    return SharedNoise(lambda logits_NV: restricted_log_probs(logits_NV, decoding), held, decoding.temperature)


def rejecting(decoding: Decoding, sequence_id_B: torch.Tensor, span: int) -> Rejection:
    held = Held(prior(SEED, sequence_id_B, V), len(sequence_id_B), span, V, torch.device("cpu"))
    return Rejection(lambda logits_NV: restricted_log_probs(logits_NV, decoding), held, SEED, sequence_id_B, span, V)


def drafted(
    teacher: CausalLM,
    drafter: Drafter,
    decoding: Decoding = PLAIN,
    rows: slice = slice(None),
    block: int = BLOCK,
    given: KnownNoise | None = None,
    rule_of: Callable[[Decoding, torch.Tensor, int], Rule] = shared,
) -> Written:
    rule = rule_of(decoding, torch.arange(ROWS)[rows], block + 1 + drafter.span)
    return speculate(teacher, drafter, rule, GIVEN_BP[rows], GIVEN_B[rows], LIMIT_B[rows], block, given)


def alike_alone_and_together(teacher: CausalLM, drafter: Drafter, decoding: Decoding, rule_of: Any) -> Written:
    """All rows in one batch; two of them were written alone as well, with the same drafts and the same verdicts."""
    together = drafted(teacher, drafter, decoding, rule_of=rule_of)
    for row in (0, 3):
        alone = drafted(teacher, drafter, decoding, rows=slice(row, row + 1), rule_of=rule_of)
        assert torch.equal(alone.ids_BL[0], together.ids_BL[row, : alone.ids_BL.shape[1]])
        assert alone.calls_B[0] == together.calls_B[row] and torch.equal(alone.offered_BK[0], together.offered_BK[row])
        assert torch.equal(alone.head_BL[0], together.head_BL[row, : alone.head_BL.shape[1]])
    return together


everyone = pytest.mark.parametrize(
    ("name", "noise"),
    [(name, noise) for name in NAMES for noise in (NONE, EVERYTHING)]
    + [(name, KNOWN) for name in NAMES if name.startswith(("mdlm", "bd3lm", "mtp"))],
    ids=lambda value: value if isinstance(value, str) else "known" if value.known else value.kind,
)


@everyone
def test_the_text_is_what_the_teacher_writes_token_by_token_whoever_drafts(folder: Path, name: str, noise: NoiseConfig) -> None:
    teacher = CausalLM(str(folder / "teacher"), dtype="float64")
    drafter, decoding = make(folder, name, teacher, noise), Decoding(1, temperature=0.8, top_k=9)
    assert torch.equal(alike_alone_and_together(teacher, drafter, decoding, shared).ids_BL, sequential(teacher, decoding))


@everyone
def test_the_rejection_rule_writes_a_row_alone_as_it_does_in_a_batch(folder: Path, name: str, noise: NoiseConfig) -> None:
    """At one block size and drafter, which decide what is refused, and so which text it is."""
    teacher = CausalLM(str(folder / "teacher"), dtype="float64")
    found = alike_alone_and_together(teacher, make(folder, name, teacher, noise), Decoding(1, temperature=2.0), rejecting)
    assert name == "nobody" or 0 < int(found.stands_BL.sum()) < int((found.head_BL > 0).sum())


def told(student: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, Any]]:
    """What a student is shown, and told of known tokens, in each of its forwards from now on."""
    calls: list[tuple[torch.Tensor, Any]] = []
    real = student.logits

    def heard(ids_AL: torch.Tensor, g_NV: torch.Tensor, *more: Any, known: Any) -> torch.Tensor:
        calls.append((ids_AL.clone(), known))
        return real(ids_AL, g_NV, *more, known=known)

    monkeypatch.setattr(student, "logits", heard)
    return calls


@pytest.mark.parametrize("name", ["mdlm", "mdlm in two forwards", "mdlm of short sight", "bd3lm", "bd3lm in two forwards", "mtp"])
def test_a_drafter_that_reads_known_tokens_noise_is_told_that_of_written_ones(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the noise of its own position, whatever the batch; a prompt's tokens, BOS and what is not written yet have none."""
    teacher, decoding = CausalLM(str(folder / "teacher"), dtype="float64"), Decoding(1, temperature=0.8)
    drafter: Any = make(folder, name, teacher, KNOWN)
    calls = told(drafter.student, monkeypatch)
    for row, block in ((0, BLOCK), (1, BLOCK), (4, 1), (0, 1)):
        calls.clear()
        alone = drafted(teacher, drafter, decoding, rows=slice(row, row + 1), block=block)
        given, text_L = int(GIVEN_B[row]), alone.ids_BL[0]
        assert torch.equal(text_L, sequential(teacher, decoding)[row, : len(text_L)])
        g_LV = 0.8 * philox.gumbel(philox.rows(SEED, torch.tensor([row] * L), torch.arange(L), NOISE_DRAW), V)
        for ids_1L, known in calls:
            assert torch.equal(known.g_KV, g_LV[known.where_K]) and bool((ids_1L[0, known.where_K] != drafter.student.mask_id).all())
            first_mask = int((ids_1L[0] == drafter.student.mask_id).int().argmax())
            places = known.where_K.tolist()
            assert all(place >= given for place in places) and places == list(range(places[0], first_mask)) if places else True
        assert any(len(known.where_K) for _, known in calls)
    drafter.student.input.known_scale.data.mul_(30)
    heard_of = drafted(teacher, drafter, decoding).stands_BL
    drafter.student.input.known_scale.data.zero_()
    assert not torch.equal(heard_of, drafted(teacher, drafter, decoding).stands_BL)


@pytest.mark.parametrize("name", ["mdlm", "mdlm in two forwards", "mdlm of short sight", "bd3lm", "bd3lm in two forwards", "mtp"])
def test_given_tokens_have_the_noise_that_the_caller_names_in_every_draft_and_batch(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 1, 3 and 4 have given tokens behind BOS; the forward that told their noise counts as a call of these."""
    teacher, decoding = CausalLM(str(folder / "teacher"), dtype="float64"), Decoding(1, temperature=0.8)
    drafter: Any = make(folder, name, teacher, KNOWN)
    drafter.student.input.known_scale.data.mul_(30)
    wide = GIVEN_BP.shape[1]
    places = torch.tensor([row * wide + position for row in range(ROWS) for position in range(1, int(GIVEN_B[row]))])
    given = KnownNoise(places, 5 * torch.randn(len(places), V, generator=torch.Generator().manual_seed(3)))
    calls = told(drafter.student, monkeypatch)
    silent, together = drafted(teacher, drafter, decoding), drafted(teacher, drafter, decoding, given=given)
    assert torch.equal(together.ids_BL, sequential(teacher, decoding)) and torch.equal(together.ids_BL, silent.ids_BL)
    assert not torch.equal(together.stands_BL, silent.stands_BL) and torch.equal(together.calls_B[[0, 2, 5]], silent.calls_B[[0, 2, 5]])
    for row in range(ROWS):
        calls.clear()
        mine_K = places // wide == row
        own = KnownNoise(places[mine_K] % wide, given.g_KV[mine_K])
        alone = drafted(teacher, drafter, decoding, rows=slice(row, row + 1), given=own if len(own.where_K) else None)
        assert alone.calls_B[0] == together.calls_B[row] and torch.equal(alone.offered_BK[0], together.offered_BK[row])
        for _, known in calls:
            told_K = known.where_K < GIVEN_B[row]
            expected_K = own.where_K >= (known.where_K.min() if len(known.where_K) else L)  # a cache holds what stands before
            assert torch.equal(known.where_K[told_K].sort()[0], own.where_K[expected_K])
            assert torch.equal(known.g_KV[told_K], own.g_KV[known.where_K[told_K] - 1])
        assert int(GIVEN_B[row]) == 1 or any(bool((known.where_K < GIVEN_B[row]).any()) for _, known in calls)


@pytest.mark.parametrize("wrong", [(), (4, 5), range(L)], ids=["a perfect drafter", "wrong twice", "always wrong"])
def test_calls_are_what_right_and_wrong_drafts_cost_and_both_write_the_same(folder: Path, wrong: Any) -> None:
    teacher = CausalLM(str(folder / "teacher"), dtype="float64")
    truth_BL = sequential(teacher, Decoding(1))
    text_BL = truth_BL.clone()
    text_BL[:, list(wrong)] = (text_BL[:, list(wrong)] + 1) % V
    found = drafted(teacher, Oracle(text_BL))
    assert torch.equal(found.ids_BL, truth_BL)
    for row, (given, limit) in enumerate(zip(GIVEN_B.tolist(), LIMIT_B.tolist(), strict=True)):
        known, calls, offered = given, 0, [0] * BLOCK
        head, stands = [0] * L, [False] * L
        while known < limit:
            room = min(BLOCK, limit - known - 1)
            for k in range(room):
                offered[k] += 1
            right = next((k for k in range(room) if known + k in wrong), room)
            for k in range(min(right + 1, room)):
                head[known + k], stands[known + k] = k + 1, k < right
            known, calls = known + right + 1, calls + 1
        assert int(found.calls_B[row]) == calls and found.offered_BK[row].tolist() == offered
        assert found.head_BL[row].tolist() == head and found.stands_BL[row].tolist() == stands


def test_the_teacher_as_its_own_drafter_is_never_refused(folder: Path) -> None:
    teacher = CausalLM(str(folder / "teacher"), dtype="float64")
    drafter = CausalDrafter(teacher)
    assert torch.equal(drafted(teacher, drafter).calls_B, -(-(LIMIT_B - GIVEN_B) // (BLOCK + 1)))
    sequence_id_B = torch.arange(ROWS)
    rule = Rejection(lambda logits_NV: restricted_log_probs(logits_NV, Decoding(1)), prior(SEED, sequence_id_B, V), SEED, sequence_id_B, BLOCK + 1, V)
    found = speculate(teacher, drafter, rule, GIVEN_BP, GIVEN_B, LIMIT_B, BLOCK)
    assert torch.equal(found.calls_B, -(-(LIMIT_B - GIVEN_B) // (BLOCK + 1)))


@pytest.mark.parametrize(("name", "noise"), [(name, NONE) for name in NAMES] + [("mdlm", EVERYTHING), ("medusa", EVERYTHING)])
def test_without_noise_the_rejection_rule_keeps_the_teachers_distribution(folder: Path, name: str, noise: NoiseConfig) -> None:
    teacher = CausalLM(str(folder / "tiny"))
    rows, decoding, words = 8_000, Decoding(1, temperature=0.7), torch.cartesian_prod(*[torch.arange(3)] * 3)
    sequence_id_B = torch.arange(rows)
    held = Held(prior(SEED, sequence_id_B, 3), rows, 8, 3, torch.device("cpu"))
    rule = Rejection(lambda logits_NV: restricted_log_probs(logits_NV, decoding), held, SEED, sequence_id_B, 8, 3)
    zeros_B1 = torch.zeros(rows, 1, dtype=torch.int64)
    drafter = make(folder, name, teacher, noise, 3, 4)
    found = speculate(teacher, drafter, rule, zeros_B1, torch.ones_like(sequence_id_B), torch.full_like(sequence_id_B, 4), 3)
    with torch.no_grad():
        logits = teacher.model(input_ids=torch.cat([torch.zeros(len(words), 1, dtype=torch.int64), words], 1)).logits[:, :-1]
    law_W = torch.log_softmax(logits.double() / decoding.temperature, -1).gather(-1, words[..., None])[..., 0].sum(1).exp()
    assert fits_counts(torch.bincount((found.ids_BL[:, 1:] * torch.tensor([9, 3, 1])).sum(1), minlength=27), law_W)
    if name != "nobody":
        assert 0.02 < float(found.stands_BL.sum() / (found.head_BL > 0).sum()) < 0.99


def test_the_first_draft_stands_as_often_as_the_two_distributions_overlap(folder: Path) -> None:
    teacher, other = CausalLM(str(folder / "tiny")), CausalLM(str(folder / "tiny-other"))
    rows = 20_000
    sequence_id_B = torch.arange(rows)
    rule = Rejection(lambda logits_NV: restricted_log_probs(logits_NV, Decoding(1)), prior(1, sequence_id_B, 3), 1, sequence_id_B, 8, 3)
    given_B, limit_B = torch.ones_like(sequence_id_B), torch.full_like(sequence_id_B, 3)
    found = speculate(teacher, CausalDrafter(other), rule, torch.zeros(rows, 1, dtype=torch.int64), given_B, limit_B, 3)
    with torch.no_grad():
        p, q = (torch.softmax(lm.model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0].double(), -1) for lm in (teacher, other))
    overlap = float(torch.minimum(p, q).sum())
    assert abs(float(found.stands_BL[:, 1].double().mean()) - overlap) < 4 * (overlap * (1 - overlap) / rows) ** 0.5


def test_noise_that_is_held_is_the_streams(folder: Path) -> None:
    sequence_id_B = torch.tensor([7, 2**40])
    asked = 0

    def source(row_N: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += len(row_N)
        return prior(SEED, sequence_id_B, V)(row_N, position_N)

    held = Held(source, 2, 4, V, torch.device("cpu"))
    for row, position in (([0, 0, 1], [1, 2, 1]), ([0, 1, 1], [2, 1, 4]), ([1, 0], [5, 9])):
        row_N, position_N = torch.tensor(row), torch.tensor(position)
        assert torch.equal(held(row_N, position_N), philox.gumbel(philox.rows(SEED, sequence_id_B[row_N], position_N, NOISE_DRAW), V))
    assert asked == 6
    with pytest.raises(AssertionError, match="further apart than 4"):
        held(torch.tensor([0, 0]), torch.tensor([3, 7]))


def test_a_teacher_of_nan_weights_is_named(folder: Path) -> None:
    teacher = CausalLM(str(folder / "teacher"))
    with torch.no_grad():
        teacher.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DatasetError, match="teacher: the teacher's log-prob of the token is nan"):
        drafted(teacher, Nobody())
