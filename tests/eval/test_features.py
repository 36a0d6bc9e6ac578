"""Features are what a model's last layer says of each text by itself; wall time is that of the draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from eval.features import Featuriser
from eval.timing import REPEATS, machine, seconds
from noise.storage import DatasetError
from tests.eval.world import VOCAB, random_rows, write_causal, write_letter_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    write_causal(folder / "same", 1, context=6)
    write_tokenizer(folder / "same")
    write_causal(folder / "letters", 2, vocab_size=13)
    write_letter_tokenizer(folder / "letters")
    return folder


def featuriser(folder: Path, name: str, pooling: str = "last") -> Featuriser:
    return Featuriser(str(folder / name), AutoTokenizer.from_pretrained(folder / "same"), VOCAB, pooling=pooling)  # type: ignore[arg-type]


def alone(of: Featuriser, ids: list[int]) -> torch.Tensor:
    """[L, D] of one row without padding."""
    with torch.no_grad():
        return of.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_row_has_the_feature_that_it_has_alone_up_to_the_models_context(folder: Path, pooling: str) -> None:
    rows, length = random_rows(4, 8), np.array([8, 3, 6, 1])
    of = featuriser(folder, "same", pooling)
    found = of.features(rows, length)
    for row, last, feature in zip(rows.tolist(), length.tolist(), found, strict=True):
        states = alone(of, row[: min(last, 6)])
        assert feature == pytest.approx((states[-1] if pooling == "last" else states.mean(0)).numpy(), abs=1e-5)


def test_a_model_with_other_tokens_reads_the_text(folder: Path) -> None:
    of = featuriser(folder, "letters")
    found = of.features(np.array([[0, 5, 12]]), np.array([3]))
    assert found[0] == pytest.approx(alone(of, [0, *of.own("w5 w12", add_special_tokens=False)["input_ids"]])[-1].numpy(), abs=1e-5)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere/at/all does not exist"):
        Featuriser("nowhere/at/all", None, VOCAB)


def test_wall_time_is_of_whole_batches_after_one_that_is_not_counted() -> None:
    drawn: list[torch.Tensor] = []
    found = seconds(drawn.append, 5, "cpu")
    assert len(drawn) == REPEATS + 1 and all(torch.equal(ids, torch.arange(5)) for ids in drawn)
    assert found.shape == (REPEATS,) and (found > 0).all() and machine("cpu")["name"]
