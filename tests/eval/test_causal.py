"""A causal LM writes its own text from known noise, and judges others' as brute force would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from eval.causal import CausalLM, model_identity
from eval.judge import Judge
from eval.sampler import NOISE_DRAW
from noise import philox
from noise.storage import DatasetError
from tests.eval.world import VOCAB, random_rows, write_causal, write_letter_tokenizer, write_tokenizer


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


def test_rows_longer_than_the_judges_context_are_refused(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"reads 64 positions, the longest row has 65"):
        judge(folder, "same").score(random_rows(1, 65), np.array([65]))


def test_nan_weights_are_named(folder: Path) -> None:
    broken = judge(folder, "same")
    with torch.no_grad():
        broken.lm.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DatasetError, match="gives sequence 0 a likelihood of nan"):
        broken.score(random_rows(2, 4), np.full(2, 4))


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
