import gzip
import itertools
import json
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from noise.storage import DatasetError, sha256_file
from pipeline import config, embedded, formats
from pipeline.corpus import Corpus, CorpusFile
from pipeline.divide import divide, in_order
from pipeline.formats import PIECE_CHARACTERS
from tests.pipeline.world import texts

TEXTS = [*texts(30), "naïve café, 東京\r\nwith two lines\n"]


def write(folder: Path, name: str) -> Path:
    """TEXTS in the format that the name says."""
    lines = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()
    path = folder / name
    table = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=7)
    elif name.endswith((".arrow", ".ipc")):
        make = pa.ipc.new_file if name.endswith(".ipc") else pa.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines))
    else:
        path.write_bytes(lines)
    return path


def open_all(files: str | list[str], **fields: object) -> Corpus:
    return Corpus.open(config.Corpus(files=files, split="all", **fields))  # type: ignore[arg-type]


def test_compressed_members_one_after_another_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert [document.text for document in open_all(str(tmp_path / "*")).documents()] == ["one two", "one two"]


FORMATS = ["c.jsonl", "c.jsonl.gz", "c.json.zst", "c.parquet", "c.arrow", "c.ipc"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_documents(tmp_path: Path, name: str) -> None:
    assert [document.text for document in open_all(str(write(tmp_path, name))).documents()] == TEXTS


@pytest.mark.parametrize("name", [*FORMATS, "c.txt"])
def test_reading_from_a_place_gives_what_follows_it(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    if name == "c.txt":
        path.write_text("\n\n".join(f"paragraph {number}, né au café " * 300 for number in range(90)))
    corpus = open_all(str(path))
    documents = list(corpus.documents())
    for start in documents[:: max(1, len(documents) // 4)]:
        for reader in (corpus, open_all(str(path))):  # a reader that was further on already, and a fresh one
            rest = list(reader.documents((start.file, start.ordinal, start.offset)))
            assert rest == documents[documents.index(start) :]


@pytest.mark.parametrize("name", FORMATS)
def test_shards_divide_the_documents_without_loss_or_overlap(tmp_path: Path, name: str) -> None:
    corpus = Corpus.open(config.Corpus(files=[str(write(tmp_path, name)), str(write(tmp_path, "b.jsonl"))], held_out=0.2))
    shards = divide(corpus, 700)
    assert corpus.listed() == [CorpusFile(path.name, path.stat().st_size, sha256_file(path)) for path in sorted(tmp_path.iterdir())]
    parts = [list(corpus.documents(shard.start, shard.stop)) for shard in shards]
    assert len(shards) > 3
    assert [document for part in parts for document in part] == list(corpus.documents())
    assert [(len(part), sum(len(document.text) for document in part)) for part in parts] == [(shard.documents, shard.characters) for shard in shards]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_unless_it_is_huge(tmp_path: Path, suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    long = "\n\n".join(f"{number} " + "word " * 40 for number in range(1000))
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"short"))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(long.encode()))
    (tmp_path / f"c.txt{suffix}").write_bytes(pack(b""))
    short, *pieces = [document.text for document in open_all(str(tmp_path / "*.txt*")).documents()]
    assert short == "short" and "".join(pieces) == long and len(pieces) == 1 + len(long) // (PIECE_CHARACTERS + 210)
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_splits_are_disjoint_complete_and_by_content_alone(tmp_path: Path) -> None:
    path = str(write(tmp_path, "c.jsonl"))
    train, held_out = (
        {document.text for document in Corpus.open(config.Corpus(files=path, split=split, held_out=0.3)).documents()}
        for split in ("train", "held_out")
    )
    assert train and held_out and not train & held_out and train | held_out == set(TEXTS)
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*reversed(TEXTS), "new"]))
    again = Corpus.open(config.Corpus(files=str(tmp_path / "more.jsonl"), split="held_out", held_out=0.3))
    assert {document.text for document in again.documents()} - {"new"} == held_out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "document 0 has no field 'text'; it has 'body', 'id'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "document 1: not valid JSON"),
        ("a.jsonl", b"[1]\n", "holds list, expected an object"),
        ("a.jsonl", b'{"text": 5}\n', "field 'text' is int, expected text"),
        ("a.txt", b"\xff\xfe bad", "is not UTF-8 text"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.zst", b"no zstd", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"long enough" * 9, mtime=0)[:-9], "cannot be read"),
        ("a.txt.zst", zstandard.compress(b"long enough" * 9)[:-9], "cannot be read"),
        ("a.parquet", b"no parquet", "not readable as Parquet"),
        ("a.arrow", b"no arrow", "not readable as Arrow"),
        ("a.parquet.gz", b"", "unpack the file first"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.") as error:
        list(open_all(str(tmp_path / name)).documents())
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["c.parquet", "c.arrow", "c.ipc"])
def test_a_missing_column_names_the_columns_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=r"no column 'body'; it has 'id', 'text': set corpus\.text_field"):
        list(open_all(str(write(tmp_path, name)), text_field="body").documents())


IDS = [[5, 6, 7], [8], [9, 10, 11, 12], list(range(300))]


def write_ids(folder: Path, name: str) -> str:
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"ids": pa.array(IDS, pa.list_(pa.int32()))}), folder / name)
    else:
        (folder / name).write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in [*IDS, [], None]))
    return str(folder / name)


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_documents_can_be_token_ids(tmp_path: Path, name: str) -> None:
    documents = list(open_all(write_ids(tmp_path, name), ids_field="ids").documents())
    assert [document.ids for document in documents] == IDS
    assert [(document.text, document.characters) for document in documents] == [("", 4 * len(ids)) for ids in IDS]
    recipes = [config.Corpus(files=write_ids(tmp_path, name), ids_field="ids", held_out=0.5, split=split) for split in ("train", "held_out")]
    sides = [[document.ids or [] for document in Corpus.open(recipe).documents()] for recipe in recipes]
    assert sorted(map(len, [*sides[0], *sides[1]])) == sorted(map(len, IDS)) and all(sides)


@pytest.mark.parametrize("value", ["[1, -2]", "[1.5]", "[true]", '"text"', "[2147483648]"])
def test_what_is_no_list_of_token_ids_is_named(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"ids": {value}}}\n')
    with pytest.raises(DatasetError, match=r"a\.jsonl, document 0: field 'ids' is no list of token ids"):
        list(open_all(str(tmp_path / "a.jsonl"), ids_field="ids").documents())
    with pytest.raises(DatasetError, match="is text, which has no field 'ids'"):
        (tmp_path / "a.txt").write_text("text")
        list(open_all(str(tmp_path / "a.txt"), ids_field="ids").documents())


def test_clean_up_changes_the_text_but_neither_its_count_nor_its_side(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"Number {n} , they said ."}) + "\n" for n in range(60)))
    as_it_is, cleaned = (
        list(Corpus.open(config.Corpus(files=str(tmp_path / "a.jsonl"), held_out=0.3, clean_up=rule)).documents()) for rule in ("none", "lm1b")
    )
    assert [document.text for document in cleaned] == [document.text.replace(" ,", ",").replace(" .", ".") for document in as_it_is]
    assert [(document.characters, document.digest) for document in cleaned] == [(len(document.text), document.digest) for document in as_it_is]


class Opened:
    """How often files are opened, and how many bytes are read of them in Python."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.times: list[str] = []
        real = formats.open_file

        def opening(location: str) -> BinaryIO:
            self.times.append(Path(location).name)
            return real(location)

        monkeypatch.setattr(formats, "open_file", opening)


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.json.zst"])
def test_planning_opens_every_file_once_and_shards_in_order_open_it_once_more(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(monkeypatch)
    corpus = open_all(str(write(tmp_path, name)))
    shards = divide(corpus, 500)
    corpus.identity()
    assert opened.times == [name]
    for shard in shards:
        list(corpus.documents(shard.start, shard.stop))
    assert opened.times == [name, name] and len(shards) > 5


def test_many_files_are_planned_in_order_with_several_read_at_once(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number:03d}.txt").write_text(f"document {number}")
    corpus = open_all(str(tmp_path / "*.txt"))
    shards = divide(corpus, 100)
    texts = [document.text for shard in shards for document in corpus.documents(shard.start, shard.stop)]
    assert texts == [f"document {number}" for number in range(200)]
    assert corpus.listed() == open_all(str(tmp_path / "*.txt")).files
    (tmp_path / "150.txt").write_bytes(b"\xff")
    with pytest.raises(DatasetError, match=r"150\.txt is not UTF-8"):
        divide(open_all(str(tmp_path / "*.txt")), 100)


@given(st.lists(st.lists(st.integers(), max_size=30), max_size=12), st.integers(1, 4))
def test_what_runs_ahead_comes_out_in_order(parts: list[list[int]], threads: int) -> None:
    assert list(in_order([partial(iter, part) for part in parts], threads)) == [item for part in parts for item in part]


def test_what_runs_ahead_stops_when_it_is_not_wanted_any_more() -> None:
    endless = in_order([itertools.count] * 5, 2)
    assert [next(endless) for _ in range(3)] == [0, 1, 2]
    endless.close()


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nothing\*\.txt' matches no file"):
        open_all([str(write(tmp_path, "c.jsonl")), str(tmp_path / "nothing*.txt")])


def test_a_file_that_changed_after_planning_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "c.jsonl")
    corpus = open_all(str(path))
    divide(corpus, 1000)
    path.write_text('{"text": "other"}\n')
    with pytest.raises(DatasetError, match=r"c\.jsonl has 18 bytes, the plan saw"):
        list(corpus.documents())


def test_the_embedded_corpus_is_prose_without_repetition_split_disjointly() -> None:
    documents = embedded.documents()
    paragraphs = [paragraph for document in documents for paragraph in document.strip().split("\n\n")]
    assert sum(map(len, documents)) > 500_000 and len(documents) > 200
    assert len({paragraph.casefold() for paragraph in paragraphs}) == len(paragraphs)
    assert all(paragraph.isascii() and "\n" not in paragraph and ">>>" not in paragraph for paragraph in paragraphs)
    sides = [{document.text for document in Corpus.open(config.Corpus(split=split)).documents()} for split in ("train", "held_out")]
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == len(documents)
