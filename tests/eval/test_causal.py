"""A causal LM writes its own text from known noise, and judges others' as brute force would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from eval.causal import CausalLM, model_identity
from eval.judge import Judge
from eval.sampler import Decoding
from eval.stream import NOISE_DRAW
from noise import philox
from noise.storage import DatasetError
from tests.eval.known import ROWS, fits_counts
from tests.eval.world import VOCAB, random_rows, write_causal, write_letter_tokenizer, write_student, write_tokenizer
from trainer.students import load_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    write_causal(folder / "same", 1)
    write_tokenizer(folder / "same")
    write_causal(folder / "bare", 1)
    write_causal(folder / "letters", 2, vocab_size=13)
    write_letter_tokenizer(folder / "letters")
    return folder


def brute_force(lm: CausalLM, ids: list[int]) -> float:
    """-log p of ids[1:], one prefix at a time."""
    total = 0.0
    for t in range(1, len(ids)):
        with torch.no_grad():
            log_p = torch.log_softmax(lm.model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double(), -1)
        total -= float(log_p[ids[t]])
    return total


def judge(folder: Path, name: str) -> Judge:
    return Judge(str(folder / name), AutoTokenizer.from_pretrained(folder / "same"), VOCAB)


def test_kv_cache_writes_what_whole_forwards_would_and_any_batch_does(folder: Path) -> None:
    lm = CausalLM(str(folder / "same"))
    ids = lm.sample(0, 6, torch.arange(5), seed=3)
    for row in range(5):
        for t in range(1, 6):
            with torch.no_grad():
                log_p = torch.log_softmax(lm.model(input_ids=ids[row : row + 1, :t]).logits[0, -1].float(), -1)
            g = philox.gumbel(philox.rows(3, torch.tensor([row]), torch.tensor([t]), NOISE_DRAW), VOCAB)[0]
            assert int(ids[row, t]) == int((log_p + g).argmax())
    assert torch.equal(ids[3:4], lm.sample(0, 6, torch.tensor([3]), seed=3))
    assert not torch.equal(ids, lm.sample(0, 6, torch.arange(5), seed=3, temperature=3.0))


@pytest.mark.parametrize(
    ("settings", "kept"), [({}, 5), ({"temperature": 0.6}, 5), ({"top_k": 3}, 3), ({"nucleus": 0.8}, 5), ({"output": "argmax"}, 1)]
)
def test_a_causal_lm_writes_from_its_own_restricted_distribution(tmp_path: Path, settings: dict, kept: int) -> None:
    write_causal(tmp_path / "lm", 3, vocab_size=5)
    lm, bos = CausalLM(str(tmp_path / "lm")), torch.zeros(ROWS, 1, dtype=torch.int64)
    ids_BL = lm.write(bos, torch.ones(ROWS, dtype=torch.int64), 3, torch.arange(ROWS), 8, Decoding(1, **settings))
    p_WV = []
    for first in [[0]] + [[0, token] for token in range(5)]:
        with torch.no_grad():
            falling = torch.softmax(lm.model(input_ids=torch.tensor([first])).logits[0, -1].double() / settings.get("temperature", 1.0), -1).sort(
                descending=True
            )
        keep = min(kept, int((falling.values.cumsum(0) - falling.values < settings.get("nucleus", 1.0)).sum()))
        p_V = torch.zeros(5, dtype=torch.float64).scatter(0, falling.indices[:keep], falling.values[:keep])
        p_WV.append(p_V / p_V.sum())
    law_W = (p_WV[0][:, None] * torch.stack(p_WV[1:])).flatten()
    found_W = torch.bincount(ids_BL[:, 1] * 5 + ids_BL[:, 2], minlength=25)
    assert not found_W[law_W == 0].any()
    assert int((law_W > 0).sum()) == 1 or fits_counts(found_W[law_W > 0], law_W[law_W > 0])


def test_prompts_of_several_lengths_are_continued_as_each_would_be_alone(folder: Path) -> None:
    lm, decoding = CausalLM(str(folder / "same")), Decoding(1, top_k=9)
    given_BP, given_B = torch.tensor([[0, 5, 6, 7], [0, 0, 0, 0], [0, 8, 0, 0]]), torch.tensor([4, 1, 2])
    ids_BL = lm.write(given_BP, given_B, 7, torch.arange(3), 3, decoding)
    for row, given in enumerate(given_B.tolist()):
        assert torch.equal(ids_BL[row, :given], given_BP[row, :given])
        alone = lm.write(given_BP[row : row + 1, :given], given_B[row : row + 1], 7, torch.tensor([row]), 3, decoding)
        assert torch.equal(ids_BL[row], alone[0])


def test_an_ar_student_writes_what_its_own_whole_forwards_say(tmp_path: Path) -> None:
    write_student(tmp_path / "ar", kind="ar")
    student, ids_BL = load_student(tmp_path / "ar"), CausalLM(str(tmp_path / "ar")).sample(0, 8, torch.arange(6), seed=3)
    sequence_id, position = (part.flatten() for part in torch.meshgrid(torch.arange(6), torch.arange(1, 8), indexing="ij"))
    g = philox.gumbel(philox.rows(3, sequence_id, position, NOISE_DRAW), VOCAB).view(6, 7, VOCAB)
    with torch.no_grad():
        assert torch.equal((torch.log_softmax(student.logits(ids_BL)[:, :-1], -1) + g).argmax(-1), ids_BL[:, 1:])


def test_logits_of_chosen_positions_are_those_before_them_in_a_whole_forward(folder: Path) -> None:
    lm, ids_BL = CausalLM(str(folder / "same")), torch.from_numpy(random_rows(3, 6)).long()
    with torch.no_grad():
        whole = lm.model(input_ids=ids_BL).logits
    assert torch.equal(lm.logits_of(ids_BL, torch.tensor([1, 8, 17])), whole[[0, 1, 2], [0, 1, 4]])


def test_likelihoods_equal_brute_force_with_padding_and_without(folder: Path) -> None:
    rows, length = random_rows(5, 7), np.array([7, 3, 7, 1, 5])
    for lengths in (length, np.full(5, 7)):
        nll, tokens = judge(folder, "same").score(rows, lengths)
        expected = [brute_force(CausalLM(str(folder / "same")), row[:last]) for row, last in zip(rows.tolist(), lengths, strict=True)]
        assert nll == pytest.approx(expected, abs=1e-4) and tokens.tolist() == (lengths - 1).tolist()


def test_a_judge_with_other_tokens_reads_the_text(folder: Path) -> None:
    reader = judge(folder, "letters")
    rows = np.array([[0, 5, 12, 3], [0, 7, 2, 1]])
    nll, tokens = reader.score(rows, np.array([4, 3]))
    expected = []
    for text in ("w5 w12 w3", "w7 w2"):
        ids = [0, *reader.own(text, add_special_tokens=False)["input_ids"]]
        expected.append(brute_force(reader.lm, ids))
    assert reader.retokenises and tokens.tolist() == [9, 5] and nll == pytest.approx(expected, abs=1e-4)


def test_a_judge_without_tokenizer_reads_ids_of_its_own_width_only(folder: Path, tmp_path: Path) -> None:
    rows = random_rows(3, 5)
    assert judge(folder, "bare").score(rows, np.full(3, 5))[0] == pytest.approx(judge(folder, "same").score(rows, np.full(3, 5))[0])
    write_causal(tmp_path / "narrow", 1, vocab_size=9)
    with pytest.raises(DatasetError, match=r"no tokenizer and its width 9 is not the students' 24"):
        Judge(str(tmp_path / "narrow"), AutoTokenizer.from_pretrained(folder / "same"), VOCAB)


def test_a_window_slides_by_half_the_judges_context_and_scores_every_token_once(folder: Path, tmp_path: Path) -> None:
    write_causal(tmp_path / "narrow", 2, context=6)
    write_tokenizer(tmp_path / "narrow")
    reader = Judge(str(tmp_path / "narrow"), AutoTokenizer.from_pretrained(folder / "same"), VOCAB)
    rows, length, heard = random_rows(4, 14), np.array([14, 6, 9, 1]), []
    nll, tokens = reader.score(rows, length, heard.append)
    for row, last, found in zip(rows.tolist(), length.tolist(), nll, strict=True):
        expected = 0.0
        for t in range(1, last):
            # the first window has positions 0 to 5, the next three more each: the token at 6 has 3, 4, 5 before it, that at 9 has 6, 7, 8
            start = 0 if t < 6 else 3 * (t // 3 - 1)
            with torch.no_grad():
                log_p = torch.log_softmax(reader.lm.model(input_ids=torch.tensor([row[start:t]])).logits[0, -1].double(), -1)
            expected -= float(log_p[row[t]])
        assert found == pytest.approx(expected, abs=1e-4)
    assert tokens.tolist() == [13, 5, 8, 0] and sum(heard) == 4


def test_nan_weights_are_named(folder: Path) -> None:
    broken = judge(folder, "same")
    with torch.no_grad():
        broken.lm.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DatasetError, match="gives sequence 0 a likelihood of nan"):
        broken.score(random_rows(2, 4), np.full(2, 4))
    with pytest.raises(DatasetError, match="log-prob of the token is nan"):
        broken.lm.sample(0, 4, torch.arange(2), seed=1)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"runs/nobody/judge does not exist"):
        model_identity("runs/nobody/judge")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"no config.json"):
        CausalLM(str(tmp_path / "empty"))


def test_identity_changes_with_the_weights_and_not_with_the_place(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 1), ("other", 2)):
        write_causal(tmp_path / name, seed)
    assert model_identity(str(tmp_path / "again")) == model_identity(str(folder / "bare")) != model_identity(str(tmp_path / "other"))
