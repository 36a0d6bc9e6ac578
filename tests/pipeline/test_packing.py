import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import concat

BOS, EOS = 0, 1
documents = st.lists(st.lists(st.integers(2, 500), max_size=40), max_size=12)


@given(documents, st.integers(2, 17))
def test_no_token_is_lost_and_every_document_ends_in_eos(texts: list[list[int]], block_length: int) -> None:
    input_ids_BL, length_B = concat(texts, BOS, EOS, block_length)
    stream = [int(token) for row, length in zip(input_ids_BL, length_B, strict=True) for token in row[1:length]]
    assert stream == [token for text in texts for token in [*text, EOS]]


@given(documents, st.integers(2, 17))
def test_blocks_begin_with_bos_and_only_the_last_is_padded(texts: list[list[int]], block_length: int) -> None:
    input_ids_BL, length_B = concat(texts, BOS, EOS, block_length)
    assert (input_ids_BL[:, 0] == BOS).all()
    assert (length_B[:-1] == block_length).all()
    assert ((length_B >= 2) & (length_B <= block_length)).all()
    assert (input_ids_BL[np.arange(block_length)[None] >= length_B[:, None]] == 0).all()
