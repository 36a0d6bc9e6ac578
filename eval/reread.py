"""Rows of the students' tokens as another language model reads them: by id where both share a vocabulary, else as text in its own tokens.

Text begins with the reader's own BOS (EOS or CLS where it has none). Shapes: S sequences, L positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.causal import load_tokenizer
from eval.metrics import Array
from noise.storage import DatasetError


def own_tokenizer(role: str, name: str, width: int, tokenizer: Any, vocab_size: int) -> Any:
    """The reader's tokenizer, or None where it reads the students' ids. Raises DatasetError where it can do neither."""
    try:
        own = load_tokenizer(name)
    except DatasetError:
        if width != vocab_size:
            raise DatasetError(
                f"{role} {name} has no tokenizer and its width {width} is not the students' {vocab_size}; "
                "put its tokenizer's files beside its weights"
            ) from None
        return None
    return own if own.get_vocab() != tokenizer.get_vocab() else None


def reread(role: str, name: str, own: Any, tokenizer: Any, ids_SL: Array, length_S: Array) -> tuple[Array, Array]:
    """(ids int64 [S, L] padded with BOS, lengths int64 [S]) of the decoded rows in the reader's own tokens."""
    first = next((token for token in (own.bos_token_id, own.eos_token_id, own.cls_token_id) if token is not None), None)
    if first is None:
        raise DatasetError(f"{role} {name}: its tokenizer has neither BOS nor EOS to begin a text with; choose another {role}")
    texts = [tokenizer.decode(row[1:length], skip_special_tokens=True) for row, length in zip(ids_SL.tolist(), length_S.tolist(), strict=True)]
    rows = [[first, *ids] for ids in own(texts, add_special_tokens=False)["input_ids"]]
    padded = np.full((len(rows), max(map(len, rows))), first, np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded, np.array([len(row) for row in rows])
