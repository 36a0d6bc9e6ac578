"""Nobody gets in: files from strangers are read or refused, within bounded memory, and nothing outside their folder is touched."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noise import storage
from noise.dataset import Manifest, Plan, open_shard
from noise.identity import identity_hash
from noise.receipt import committed
from noise.seal import TOKENIZER_FILES, copy_tokenizer, sealed
from noise.shard import ShardReader
from noise.sketch import Codec
from noise.storage import DatasetError, readable_json
from noise.unpacked import Table, blocks
from tests.noise import hostile
from tests.noise.teachers import BigramTeacher, write_dataset
from trainer.shards import NoiseDataset

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "corpus"
MEGABYTES = 384
"""Of address space that a reader may take for a file of a few kilobytes."""
HOSTILE_NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**62, -(2**63))
FINE = {"read", "DatasetError"}
some = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def seed(kind: str, name: str = "whole") -> bytes:
    return (CORPUS / kind / name).read_bytes()


def outcomes(files: list[tuple[str, Path]], seconds: float = 120) -> list[str]:
    """Of files read in a process that may take so much memory and no more; it must live."""
    arguments = [word for kind, path in files for word in (kind, str(path))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-m", "tests.noise.hostile", str(MEGABYTES), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    assert done.returncode == 0, f"a reader died of {done.returncode}: {done.stderr[-2000:]}"
    found: list[str] = json.loads(done.stdout)
    return found


# what CI replays: whatever the coverage-guided search has kept, and bombs


def test_everything_that_the_search_has_kept_is_read_or_refused_within_bounded_memory() -> None:
    files = [(kind.name, path) for kind in sorted(CORPUS.iterdir()) for path in sorted(kind.iterdir())]
    found = outcomes(files)
    assert len(files) > 20 and set(found) == FINE, [pair for pair in zip(files, found, strict=True) if pair[1] not in FINE]


def patched(content: bytes, kind: str, at: int, value: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(kind, changed, at, value)
    return bytes(changed)


def metadata_places(content: bytes) -> Iterator[int]:
    """Where the numbers of an Arrow file's metadata lie: footer, and the message of each batch, four bytes at a time."""
    length = struct.unpack_from("<i", content, len(content) - 10)[0]
    yield from range(len(content) - 10 - length & ~3, len(content) - 8, 4)
    for offset, size in blocks(content):
        yield from range(offset, offset + size, 4)


def shard_bombs() -> Iterator[bytes]:
    """Lengths, offsets and sizes that say anything, at every place of the metadata of a plain and of a compressed shard."""
    for name in ("plain", "zstd"):
        content = seed("shard", name)
        for number, at in enumerate(metadata_places(content)):
            value = HOSTILE_NUMBERS[number % len(HOSTILE_NUMBERS)]
            yield patched(content, "<q", min(at, len(content) - 8), value) if number % 2 else patched(content, "<I", at, value % 2**32)
    for value in (2**30 + 1, 2**40, 2**62, -2):
        for at in prefixes(seed("shard", "zstd")):
            yield patched(seed("shard", "zstd"), "<q", at, value)


def prefixes(content: bytes) -> list[int]:
    """Where the compressed buffers of the first batch say how large they are."""
    offset, size = blocks(content)[0]
    batch = Table.root(memoryview(content), offset + 8).table(2)
    assert batch is not None
    first, count = batch.vector(2)
    buffers = [struct.unpack_from("<qq", content, at) for at in range(first, first + 16 * count, 16)]
    return [offset + size + start for start, length in buffers if length]


def json_bombs() -> Iterator[bytes]:
    yield b"[" * 10**6
    yield b'{"a":' * 100_000
    yield b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"
    yield b'{"a":[' + b"0," * (storage.MOST_VALUES + 10) + b"0]}"
    yield b'{"a":' + b"9" * 5000 + b"}"
    yield b'{"a":1e999}'
    yield b'{"a":NaN}'
    yield b'{"identity":{"format_version":2,"extraction":"\\ud800"}}'
    yield b"\xff\xfe{}"


def tensor_bombs() -> Iterator[bytes]:
    def tensors(header: Any, body: bytes = b"\0" * 24, length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + body

    whole = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    yield tensors({"a": whole}, length=2**63)
    yield tensors({"a": whole}, length=10**8)
    for change in ({"shape": [2**62, 2**62]}, {"shape": [-1]}, {"data_offsets": [0, 2**62]}, {"data_offsets": [24, 0]}, {"dtype": "PICKLE"}):
        yield tensors({"a": whole | change})
    yield tensors({"a": whole, "b": whole})
    yield tensors(b"[" * 10**6)


def test_bombs_are_refused_within_bounded_memory_and_nothing_dies(tmp_path: Path) -> None:
    files: list[tuple[str, Path]] = []
    for kind, contents in (("shard", shard_bombs()), ("manifest", json_bombs()), ("receipt", json_bombs()), ("tensors", tensor_bombs())):
        for number, content in enumerate(contents):
            files.append((kind, tmp_path / f"{kind}-{number}"))
            files[-1][1].write_bytes(content)
    found = outcomes(files)
    assert set(found) <= FINE, {pair[1] for pair in zip(files, found, strict=True)} - FINE
    assert all(outcome == "DatasetError" for (kind, _), outcome in zip(files, found, strict=True) if kind != "shard")
    refused = [outcome == "DatasetError" for (kind, _), outcome in zip(files, found, strict=True) if kind == "shard"]
    assert sum(refused) > len(refused) / 3 and all(refused[-4 * len(prefixes(seed("shard", "zstd"))) :]), "no buffer may say what it likes"


def test_a_compressed_batch_larger_than_a_reader_allows_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    content = seed("shard", "zstd")
    (tmp_path / "bomb").write_bytes(patched(content, "<q", prefixes(content)[1], 2**31))
    with pytest.raises(DatasetError, match=r"says that it unpacks to 2,147,\d+,\d+ bytes; a reader allows 1,073,741,824"):
        list(ShardReader(tmp_path / "bomb"))
    (tmp_path / "whole").write_bytes(content)
    assert sum(map(len, ShardReader(tmp_path / "whole"))) == 3


# hypothesis: valid bytes, changed where it matters


changes = st.lists(
    st.tuples(st.integers(0, 2**16), st.sampled_from(HOSTILE_NUMBERS), st.sampled_from(["<q", "<i", "<H", "<B"])), min_size=1, max_size=4
)


@some
@given(name=st.sampled_from(["plain", "zstd", "version-one"]), changes=changes, cut=st.none() | st.integers(0, 3000))
def test_a_shard_with_other_numbers_in_its_structure_is_read_or_refused(name: str, changes: list[tuple[int, int, str]], cut: int | None) -> None:
    content = seed("shard", name)
    places = list(metadata_places(content))
    for at, value, kind in changes:
        size = struct.calcsize(kind)
        content = patched(content, kind.upper() if kind != "<q" else kind, min(places[at % len(places)], len(content) - size),
                          value if kind == "<q" else value % 256**size)  # fmt: skip
    assert hostile.of_bytes("shard", content if cut is None else content[:cut]) in FINE


hostile_json: Any = st.recursive(
    st.none() | st.booleans() | st.sampled_from(HOSTILE_NUMBERS) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "0" * 64, "\ud800", "00000.arrow", "2" * 30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and item of a JSON value."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [place for name, inner in items for place in ((*path, name), *places_of(inner, (*path, name)))]


def mutated(value: Any, at: int, change: Any, remove: bool) -> Any:
    places = places_of(value)
    *path, last = places[at % len(places)]
    inner = value
    for name in path:
        inner = inner[name]
    if remove:
        del inner[last]
    else:
        inner[last] = change
    return value


@settings(some, max_examples=300)
@given(
    kind=st.sampled_from(["manifest", "plan", "receipt", "loader", "seal", "student"]),
    at=st.integers(0, 200),
    change=hostile_json,
    remove=st.booleans(),
    honest=st.booleans(),
)
def test_json_with_any_value_in_any_place_is_read_or_refused(kind: str, at: int, change: Any, remove: bool, honest: bool) -> None:
    """`honest`: whoever changed it also made its hashes again."""
    value = mutated(json.loads(seed(kind)), at, change, remove)
    if honest and isinstance(value.get("identity"), dict):
        value["identity_hash"] = identity_hash(value["identity"])
        value = sealed(value)
    if honest and kind == "seal":
        value = sealed(value, "seal_hash")
    assert hostile.of_bytes(kind, json.dumps(value).encode()) in FINE


@some
@given(at=st.integers(0, 60), change=hostile_json, remove=st.booleans())
def test_a_checkpoints_header_with_any_value_is_read_or_refused(at: int, change: Any, remove: bool) -> None:
    content = seed("tensors")
    length = struct.unpack_from("<Q", content)[0]
    header = json.dumps(mutated(json.loads(content[8 : 8 + length]), at, change, remove)).encode()
    assert hostile.of_bytes("tensors", struct.pack("<Q", len(header)) + header + content[8 + length :]) in FINE


def test_a_student_that_says_it_is_larger_than_its_weights_is_refused_before_it_is_built(tmp_path: Path) -> None:
    from tests.trainer.chain import write_chain
    from trainer.config import StudentConfig
    from trainer.students import build, load_student, save_student

    student = build(StudentConfig(layers=1, hidden=16, heads=2), 13, 8)
    assert write_chain is not None
    save_student(tmp_path, student, student.own_state(), {}, {})
    about = json.loads((tmp_path / "student.json").read_text())
    assert load_student(tmp_path).vocab_size == 13
    for change in ({"layers": 10**9}, {"hidden": 2**30}, {"layers": -1}, {"heads": "two"}, {"noise": {"rank": 2**31}}, {"kind": "pickle"}):
        (tmp_path / "student.json").write_text(json.dumps(about | {"student": about["student"] | change}))
        with pytest.raises(DatasetError, match="does not describe a student"):
            load_student(tmp_path)
    (tmp_path / "student.json").write_text(json.dumps(about | {"vocab_size": 2**31}))
    with pytest.raises(DatasetError, match="does not describe a student"):
        load_student(tmp_path)


def claimed(folder: Path, rows: list[int]) -> None:
    """Have the manifest of a dataset say that its shards have so many rows; all hashes fit."""
    value = json.loads((folder / "manifest.json").read_text())
    for receipt, count in zip(value["receipts"], rows, strict=True):
        receipt["rows"] = count
    value["totals"]["rows"] = sum(rows)
    (folder / "manifest.json").write_text(readable_json(sealed({name: field for name, field in value.items() if name != "manifest_hash"})))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([10**12, 2], "shard 0 has 1,000,000,000,000 rows, a shard has at most 4,294,967,296"),
        ([2**32, 2], "has 1 record batches, too few or too many for the 4,294,967,296 rows of its receipt"),
        ([64, 2], "record batch 0 has 3 rows, the receipt 64"),
        ([2, 2], "record batch 0 has 3 rows, the receipt 2"),
        ([0, 5], "record batch 0 has 2 rows, the receipt 5"),
    ],
)
def test_a_manifest_that_claims_other_rows_than_there_are_leads_the_trainer_past_no_end(folder: Path, rows: list[int], message: str) -> None:
    claimed(folder, rows)
    tracemalloc.start()
    with pytest.raises(DatasetError, match=message):
        dataset = NoiseDataset(folder)
        dataset.batch(dataset.order(1).at(0, 64)[0])
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


# no path outside the folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data" / "set", BigramTeacher(19), Codec(19), [3, 2], block_length=4)
    return tmp_path / "data" / "set"


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "00000.arrow/../../secret", "00001.arrow", "00000.arrow\0", ""])
def test_a_receipt_that_names_another_file_is_refused(folder: Path, name: str) -> None:
    value = json.loads((folder / "manifest.json").read_text())
    value["receipts"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(sealed(value)))
    with pytest.raises(DatasetError, match="names the file"):
        Manifest.read(folder)
    (folder / "shards" / "00000.json").write_text(json.dumps(value["receipts"][0]))
    with pytest.raises(DatasetError, match="names the file"):
        committed(folder)


@pytest.mark.parametrize("name", ["shards/00000.arrow", "shards/00000.json", "manifest.json", "plan.json", "shards"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(folder: Path, name: str) -> None:
    def read_all() -> None:
        manifest = Manifest.read(folder)
        Plan.read(folder)
        committed(folder)
        for receipt in manifest.receipts:
            open_shard(folder, receipt, manifest.identity)

    read_all()
    outside = folder.parents[1] / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(DatasetError, match="is a link that leads out of the dataset"):
        read_all()
    (folder / name).unlink()
    inside = folder / "elsewhere"
    outside.rename(inside)
    (folder / name).symlink_to(inside)
    read_all()


def test_a_snapshot_of_the_hubs_client_whose_files_are_links_to_its_blobs_is_read(folder: Path, tmp_path: Path) -> None:
    snapshot, store = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    store.mkdir(parents=True)
    for number, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
        there = snapshot / path.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        path.rename(store / str(number))
        there.symlink_to(os.path.relpath(store / str(number), there.parent))
    manifest = Manifest.read(snapshot)
    assert sum(len(rows) for receipt in manifest.receipts for rows in open_shard(snapshot, receipt, manifest.identity)) == 5


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path, kind: str) -> None:
    path = folder / "manifest.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(DatasetError, match=r"is not a file|is a link that leads out"):
        Manifest.read(folder)


def test_a_file_too_large_to_be_a_manifest_is_refused_unread(folder: Path) -> None:
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(storage.LARGEST_FILE + 1)
    with pytest.raises(DatasetError, match="has 268,435,457 bytes; no file of a dataset but its shards is larger"):
        Manifest.read(folder)


def test_of_a_tokenizers_folder_only_a_tokenizers_files_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "tokenizer", tmp_path / "student"
    source.mkdir()
    target.mkdir()
    (target / "student.json").write_text("mine")
    for name in ("tokenizer.json", "student.json", "model.safetensors", "modeling_evil.py", "config.json"):
        (source / name).write_text("theirs")
    copy_tokenizer(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["student.json", "tokenizer.json"]
    assert (target / "student.json").read_text() == "mine" and "tokenizer.json" in TOKENIZER_FILES


# no code, no pickle


def test_nothing_here_unpickles_or_runs_what_it_reads() -> None:
    forbidden = ("pickle.load", "allow_pickle=True", "weights_only=False", "trust_remote_code=True", "yaml.load(", "yaml.unsafe", "joblib", "dill")
    for room in ("noise", "pipeline", "trainer", "eval"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            assert not [word for word in forbidden if word in text], path
            assert text.count("torch.load(") == text.count("weights_only=True"), f"{path}: torch.load without weights_only=True runs code"
            from_folders = text.count(".from_pretrained(") - text.count("def from_pretrained(")
            assert text.count("trust_remote_code=False") >= from_folders, f"{path}: from_pretrained without trust_remote_code=False"


def test_a_batch_that_arrow_would_have_to_unpack_is_measured_as_arrow_unpacks_it(tmp_path: Path) -> None:
    content = seed("shard", "zstd")
    from noise.unpacked import unpacked_bytes

    (block,) = blocks(content)
    before = pa.total_allocated_bytes()
    batch = pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
    assert 0 < pa.total_allocated_bytes() - before <= 64 * 14 + unpacked_bytes(content, block) <= 64 * 14 + batch.get_total_buffer_size() + 64 * 14
    assert unpacked_bytes(seed("shard", "plain"), blocks(seed("shard", "plain"))[0]) == 0
