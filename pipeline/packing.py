"""Documents of tokens -> blocks that begin with BOS.

    concat   every document is followed by EOS, documents follow each other, and the stream is cut
    pad      every document with its EOS has rows of its own; a longer one goes on in the next row, or is cut

A document that ends in EOS already gets no second one. With `block_end: eos` every block ends in an EOS of its own; under
`pad` that one stands for the document's. Every token is in a row or among those counted as dropped:

    concat               sum(length - 1) + dropped = tokens of the documents, each with its EOS
    concat, block_end    sum(length - 2) + dropped = the same
    pad, block_end       sum(length - 2) + dropped = tokens of the documents without EOS

Blocks that are not full are padded with 0, and `length` says where they end. Shapes: B blocks, L block length.

Published layouts. OpenWebText wrapped at 1,024 (MDLM, BD3-LM): concat, block_end eos, tail drop. LM1B at 128, wrapped: the
same; padded: pad, block_end eos, long_documents cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Packed:
    """The rows of some documents."""

    input_ids_BL: Blocks
    length_B: Blocks
    dropped: int
    """Tokens that are in no row."""


@dataclass(frozen=True)
class Packer:
    """How documents become rows: `config.Packing` with the tokens that it needs."""

    bos: int
    eos: int
    block_length: int
    policy: str = "concat"
    block_end: str = "none"
    tail: str = "pad"
    long_documents: str = "split"

    @classmethod
    def of(cls, identity: dict[str, Any]) -> Packer:
        """The layout that a dataset's identity describes."""
        names = ("policy", "block_end", "tail", "long_documents")
        rule = {name: identity["packing"][name] for name in names if name in identity["packing"]}
        return cls(identity["tokenizer"]["bos"], identity["tokenizer"]["eos"], identity["block_length"], **rule)

    def identity(self) -> dict[str, Any]:
        """The packing part of an identity; what stands at its default is left out."""
        rule: dict[str, Any] = {"policy": self.policy, "first": "bos", "after_document": "eos"}
        if self.policy == "pad":
            rule["long_documents"] = self.long_documents
        return rule | {name: value for name, value in (("block_end", self.block_end), ("tail", self.tail)) if value not in ("none", "pad")}

    @property
    def body(self) -> int:
        """Tokens of documents in a full block."""
        return self.block_length - (1 if self.block_end == "none" else 2)

    def pack(self, documents: Iterable[Sequence[int]]) -> Packed:
        if self.policy == "concat":
            stream = np.concatenate([self._ended(document) for document in documents] or [np.empty(0, np.int32)])
            pieces = self._cut(stream)
            if self.tail == "drop" and len(pieces) > 1 and len(pieces[-1]) < self.body:  # a shard's only block is kept
                return self._rows(pieces[:-1], len(pieces[-1]))
            return self._rows(pieces, 0)
        pieces, dropped = [], 0
        for document in documents:
            parts = self._cut(self._ended(document) if self.block_end == "none" else self._ended(document)[:-1])
            if self.long_documents == "cut":
                parts, rest = parts[:1], parts[1:]
                dropped += sum(map(len, rest))
            pieces += parts or [np.empty(0, np.int32)]
        return self._rows(pieces, dropped)

    def _ended(self, document: Sequence[int]) -> Blocks:
        ended = len(document) > 0 and document[-1] == self.eos
        return np.asarray(document if ended else [*document, self.eos], np.int32)

    def _cut(self, tokens: Blocks) -> list[Blocks]:
        return [tokens[start : start + self.body] for start in range(0, len(tokens), self.body)]

    def _rows(self, pieces: list[Blocks], dropped: int) -> Packed:
        input_ids_BL = np.zeros((len(pieces), self.block_length), np.int32)
        input_ids_BL[:, 0] = self.bos
        length_B = np.array([1 + len(piece) for piece in pieces], np.int32)
        if pieces:
            input_ids_BL[:, 1 : 1 + self.body][np.arange(self.body) < length_B[:, None] - 1] = np.concatenate(pieces)
        if self.block_end == "eos":
            input_ids_BL[np.arange(len(pieces)), length_B] = self.eos
            length_B += 1
        return Packed(input_ids_BL, length_B, dropped)
