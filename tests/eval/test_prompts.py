"""What is given of a row: read from lines, refused by line, and known to the teacher by its posterior noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.prompts import BLANK, Prompts, prefix_lengths
from noise.storage import DatasetError
from tests.eval.world import VOCAB


class Words:
    """w<i> is token i."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word[1:]) for word in text.split()]}


def read(folder: Path, *lines: str, length: int = 8) -> Prompts:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return Prompts.read(path, Words(), 0, VOCAB, length)


def test_prompts_texts_with_blanks_and_ids_become_rows_of_their_own_length(tmp_path: Path) -> None:
    prompts = read(
        tmp_path,
        '{"text": "w5 w6"}',
        "",
        '{"text": ["w5", 2, "w7"]}',
        '{"ids": [null, 9], "length": 4}',
        '{"text": "w5", "length": 3}',
    )
    B = BLANK
    assert prompts.given_PL.tolist() == [
        [0, 5, 6, B, B, B, B, B],
        [0, 5, B, B, 7, 0, 0, 0],
        [0, B, 9, B, 0, 0, 0, 0],
        [0, 5, B, 0, 0, 0, 0, 0],
    ]
    assert prompts.length_P.tolist() == [8, 5, 4, 3] and prompts.padded
    given_BL, length_B = prompts.rows(torch.tensor([5, 0]))
    assert torch.equal(given_BL, prompts.given_PL[[1, 0]]) and length_B.tolist() == [5, 8]
    assert Prompts.bare(3, 4).given_PL.tolist() == [[3, B, B, B]] and not Prompts.bare(3, 4).padded


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: "),
        ('["w5"]', "either text or ids"),
        ('{"text": "w5", "ids": [5]}', "either text or ids"),
        ('{"text": "w5", "lenght": 5}', "either text or ids"),
        ('{"ids": [5, -1]}', "null for a blank"),
        ('{"ids": [5, true]}', "null for a blank"),
        ('{"ids": [24]}', "token 24 is outside the student's vocabulary of 24"),
        ('{"text": ["w5", 0]}', "text has 0"),
        ('{"text": "w1 w2 w3 w4 w5 w6 w7"}', "has no blank"),
        ('{"text": ["w5", 7]}', "8 positions after BOS"),
        ('{"text": "w5 w6", "length": 2}', "2 positions after BOS and length 2"),
        ('{"text": "w5", "length": 9}', "length must be in 2..8"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DatasetError) as error:
        read(tmp_path, '{"text": "w5"}', line)
    assert message in str(error.value) and "prompts.jsonl, line 2: " in str(error.value)


def test_a_file_that_is_empty_or_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has no lines"):
        read(tmp_path, "")
    with pytest.raises(DatasetError, match="cannot be read"):
        Prompts.read(tmp_path / "gone", Words(), 0, VOCAB, 8)


def test_a_causal_lm_takes_prefixes_alone(tmp_path: Path) -> None:
    assert prefix_lengths(read(tmp_path, '{"text": "w5 w6"}', '{"text": "w5", "length": 3}')).tolist() == [3, 2]
    with pytest.raises(ValueError, match=r"prompt 1 has tokens after its blanks"):
        prefix_lengths(read(tmp_path, '{"text": "w5 w6"}', '{"text": ["w5", 1, "w6"]}'))
