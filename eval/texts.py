"""Texts of a sample set: an Arrow file of `sample`, a text file of one text a line, or JSONL with {"text": ...}."""

from __future__ import annotations

import json
from pathlib import Path

from eval import tables
from eval.causal import load_tokenizer
from noise.storage import DatasetError


def read_texts(path: Path, tokenizer: str, count: int = 0) -> list[str]:
    """The first `count` texts (0: all), BOS left out. Raises DatasetError for a file that holds none."""
    texts = _from_arrow(path, tokenizer, count) if path.suffix == ".arrow" else _from_lines(path)[: count or None]
    if not texts:
        raise DatasetError(f"{path} holds no texts")
    return texts


def _from_arrow(path: Path, tokenizer: str, count: int) -> list[str]:
    if not tokenizer:
        raise DatasetError(f"{path} holds tokens; give the folder of their tokenizer: --tokenizer")
    columns, _ = tables.read(path)
    ids = columns.get("input_ids")
    if ids is None:
        raise DatasetError(f"{path} has no column input_ids; give a set that `python -m eval sample` made")
    lengths = columns["length"].tolist() if "length" in columns else [ids.shape[1]] * len(ids)
    decoder = load_tokenizer(tokenizer)
    rows = zip(ids[: count or None].tolist(), lengths, strict=False)
    return [decoder.decode(row[1:length], skip_special_tokens=True) for row, length in rows]


def _from_lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"samples {path} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        return lines
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DatasetError(f'samples {path}, line {number}, is not an object with a "text"')
        texts.append(text)
    return texts
