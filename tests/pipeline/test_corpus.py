import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from noise.storage import DatasetError
from pipeline import config, embedded
from pipeline.corpus import PIECE_CHARACTERS, Corpus
from pipeline.plan import divide
from tests.pipeline.world import texts

TEXTS = [*texts(30), "naïve café, 東京\r\nwith two lines\n"]


def write(folder: Path, name: str) -> Path:
    """TEXTS in the format that the name says."""
    lines = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)).encode()
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=7)
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


FORMATS = ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet"]


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
        rest = list(corpus.documents((start.file, start.ordinal, start.offset)))
        assert rest == documents[documents.index(start) :]


@pytest.mark.parametrize("name", FORMATS)
def test_shards_divide_the_documents_without_loss_or_overlap(tmp_path: Path, name: str) -> None:
    corpus = Corpus.open(config.Corpus(files=[str(write(tmp_path, name)), str(write(tmp_path, "b.jsonl"))], held_out=0.2))
    shards = divide(corpus, 700)
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
        ("a.txt.gz", gzip.compress(b"long enough" * 9)[:-9], "cannot be read"),
        ("a.txt.zst", zstandard.compress(b"long enough" * 9)[:-9], "cannot be read"),
        ("a.parquet", b"no parquet", "not readable as Parquet"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.") as error:
        list(open_all(str(tmp_path / name)).documents())
    assert message in str(error.value)


def test_a_missing_parquet_column_names_the_columns_there_are(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no column 'body'; it has 'id', 'text'"):
        list(open_all(str(write(tmp_path, "c.parquet")), text_field="body").documents())


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nothing\*\.txt' matches no file"):
        open_all([str(write(tmp_path, "c.jsonl")), str(tmp_path / "nothing*.txt")])


def test_a_file_that_changed_after_planning_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "c.jsonl")
    corpus = open_all(str(path))
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
