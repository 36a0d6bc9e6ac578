import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import Packed, Packer

BOS, EOS = 0, 1
documents = st.lists(st.lists(st.integers(2, 500), max_size=40), max_size=12)
lengths = st.integers(3, 17)
everything = st.builds(
    Packer,
    st.just(BOS),
    st.just(EOS),
    lengths,
    st.sampled_from(["concat", "pad"]),
    st.sampled_from(["none", "eos"]),
    st.sampled_from(["pad", "drop"]),
    st.sampled_from(["split", "cut"]),
)


def bodies(packed: Packed, packer: Packer) -> list[list[int]]:
    """The tokens of each block without its BOS, its own EOS and padding."""
    end = 1 if packer.block_end == "eos" else 0
    return [row[1 : length - end].tolist() for row, length in zip(packed.input_ids_BL, packed.length_B, strict=True)]


@given(documents, everything)
def test_blocks_begin_with_bos_end_as_asked_and_are_padded_with_zeros(texts: list[list[int]], packer: Packer) -> None:
    packed = packer.pack(texts)
    assert packed.input_ids_BL.dtype == packed.length_B.dtype == np.int32
    assert (packed.input_ids_BL[:, 0] == BOS).all()
    assert ((packed.length_B >= 2) & (packed.length_B <= packer.block_length)).all()
    assert (packed.input_ids_BL[np.arange(packer.block_length)[None] >= packed.length_B[:, None]] == 0).all()
    if packer.block_end == "eos":
        assert (packed.input_ids_BL[np.arange(len(packed.length_B)), packed.length_B - 1] == EOS).all()


@given(documents, everything)
def test_every_token_is_in_a_row_or_counted_as_dropped(texts: list[list[int]], packer: Packer) -> None:
    packed = packer.pack(texts)
    own_eos = packer.policy == "concat" or packer.block_end == "none"
    given_tokens = sum(map(len, texts)) + len(texts) * own_eos
    assert sum(map(len, bodies(packed, packer))) + packed.dropped == given_tokens
    may_drop = (packer.policy, packer.tail) == ("concat", "drop") or (packer.policy, packer.long_documents) == ("pad", "cut")
    assert may_drop or packed.dropped == 0


@given(documents, st.integers(2, 17))
def test_concatenated_documents_follow_each_other_and_only_the_last_block_is_padded(texts: list[list[int]], block_length: int) -> None:
    packer = Packer(BOS, EOS, block_length)
    packed = packer.pack(texts)
    assert [token for body in bodies(packed, packer) for token in body] == [token for text in texts for token in [*text, EOS]]
    assert (packed.length_B[:-1] == block_length).all()


@given(documents, lengths)
def test_the_published_wrapping_is_full_blocks_of_bos_tokens_eos(texts: list[list[int]], block_length: int) -> None:
    packer = Packer(BOS, EOS, block_length, block_end="eos", tail="drop")
    stream = [token for text in texts for token in [*text, EOS]]
    size = block_length - 2
    full = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
    packed = packer.pack(texts)
    if full:
        assert packed.input_ids_BL.tolist() == [[BOS, *block, EOS] for block in full]
        assert packed.dropped == len(stream) % size
    else:  # the only block of a shard is kept
        assert bodies(packed, packer) == [stream] * bool(stream)


def test_padded_documents_have_rows_of_their_own() -> None:
    texts = [[5, 6], [7, 8, 9, 10, 11], [], [12, 13, 14]]
    split, cut, ended = (Packer(BOS, EOS, 5, "pad", *rule) for rule in (("none", "pad", "split"), ("none", "pad", "cut"), ("eos", "pad", "cut")))
    assert bodies(split.pack(texts), split) == [[5, 6, 1], [7, 8, 9, 10], [11, 1], [1], [12, 13, 14, 1]]
    assert bodies(cut.pack(texts), cut) == [[5, 6, 1], [7, 8, 9, 10], [1], [12, 13, 14, 1]] and cut.pack(texts).dropped == 2
    assert bodies(ended.pack(texts), ended) == [[5, 6], [7, 8, 9], [], [12, 13, 14]] and ended.pack(texts).dropped == 2


def test_ids_that_end_in_eos_get_no_second_one() -> None:
    packer = Packer(BOS, EOS, 9)
    assert bodies(packer.pack([[4, 5, EOS], [6]]), packer) == [[4, 5, EOS, 6, EOS]]


@given(everything)
def test_an_identity_gives_the_packing_back(packer: Packer) -> None:
    identity = {"tokenizer": {"bos": BOS, "eos": EOS}, "block_length": packer.block_length, "packing": packer.identity()}
    texts = [[2, 3, 4, 5, 6, 7], [8], list(range(2, 40))]
    again = Packer.of(identity).pack(texts)
    packed = packer.pack(texts)
    assert again.input_ids_BL.tolist() == packed.input_ids_BL.tolist() and again.dropped == packed.dropped
