"""Where a corpus can be: this machine, a store, the hub, a folder of `datasets`."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from noise.storage import DatasetError
from pipeline import config, files
from pipeline.corpus import Corpus
from pipeline.divide import divide
from tests.pipeline.stores import COMMIT, DATASET, S3, Hub, serving
from tests.pipeline.world import environment


def parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue()


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_of(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents()]


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a/*.txt", "a/b.txt", True),
        ("a/*.txt", "a/b/c.txt", False),
        ("a/**/*.txt", "a/c.txt", True),
        ("a/**/*.txt", "a/b/d/c.txt", True),
        ("a/**", "a/b/c.txt", True),
        ("a?[0-2].txt", "ab1.txt", True),
        ("a?[0-2].txt", "ab3.txt", False),
        ("a[!0].txt", "a1.txt", True),
        ("a.txt", "abtxt", False),
    ],
)
def test_globs_mean_elsewhere_what_they_mean_here(tmp_path: Path, pattern: str, path: str, matches: bool) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("x")
    assert bool(files.glob_pattern(pattern).fullmatch(path)) == matches
    assert bool(files._matches(str(tmp_path / pattern), "train")) == matches


@pytest.mark.parametrize(
    ("locations", "root"),
    [
        (["/data/a/x.txt", "/data/b/y.txt"], "/data"),
        (["/x.txt", "/y.txt"], "/"),
        (["s3://bucket/a/x.txt", "s3://bucket/a/y.txt"], "s3://bucket/a"),
        (["s3://bucket/x.txt?region=here", "s3://bucket/y.txt?region=here"], "s3://bucket/?region=here"),
        (["hf://datasets/me/data@1/x", "hf://datasets/me/data@1/y/z"], "hf://datasets/me/data@1"),
        (["s3://one/x.txt", "s3://two/x.txt"], ""),
        (["/x.txt", "s3://two/x.txt"], ""),
    ],
)
def test_paths_are_relative_to_the_deepest_common_root(locations: list[str], root: str) -> None:
    assert files.common_root(locations) == root
    for location in locations:
        path = files.relative(location, root)
        assert files.join(root, path) == location and files.root_of(location, path) == root
        assert "?" not in path or not root


def test_s3_is_read_like_a_folder_and_planning_fetches_every_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    there = {"bucket/a/1.jsonl": lines("one", "two"), "bucket/a/b/2.txt": b"three", "bucket/a/b/3.parquet": parquet(["four"]), "bucket/c.txt": b"no"}
    with serving(S3, there) as (host, sent):
        options = f"?endpoint_override={host}&scheme=http&region=us-east-1"
        recipe = config.Corpus(files=[f"s3://bucket/a/*.jsonl{options}", f"s3://bucket/a/**/[23].*{options}"], split="all")
        corpus = Corpus.open(recipe)
        shards = divide(corpus, 1)
        assert sent == {path: len(content) for path, content in there.items() if path != "bucket/c.txt"}
        assert [file.path for file in corpus.files] == ["1.jsonl", "b/2.txt", "b/3.parquet"] and corpus.roots == [f"s3://bucket/a{options}"]
        assert texts_of(corpus) == ["one", "two", "three", "four"]
        assert [document.text for document in corpus.documents(shards[1].start, shards[1].stop)] == ["two"]
        with pytest.raises(DatasetError, match=r"nothing\*\.txt.* matches no file"):
            Corpus.open(config.Corpus(files=f"s3://bucket/nothing*.txt{options}"))
        there["bucket/a/1.jsonl"] += lines("more")
        with pytest.raises(DatasetError, match=r"1\.jsonl.* bytes, the plan saw 32: it was changed"):
            texts_of(corpus)


def test_a_scheme_without_a_client_and_a_password_in_an_address_are_refused() -> None:
    with pytest.raises(DatasetError, match="nothing here reads nowhere://"):
        Corpus.open(config.Corpus(files="nowhere://x/*.txt"))
    with pytest.raises(DatasetError, match="an address with credentials is refused"):
        Corpus.open(config.Corpus(files="s3://me:secret@bucket/*.txt"))


def test_other_stores_are_read_through_fsspec() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/corpus-test/a.jsonl": lines("one"), "/corpus-test/b.jsonl": lines("two")})
    corpus = Corpus.open(config.Corpus(files="memory://corpus-test/*.jsonl", split="all"))
    assert texts_of(corpus) == ["one", "two"] and [file.path for file in corpus.files] == ["a.jsonl", "b.jsonl"]


def test_a_folder_of_save_to_disk_is_its_rows(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["one", "two", "three"]})
    rows.save_to_disk(str(tmp_path / "rows"), num_shards=2)
    assert texts_of(Corpus.open(config.Corpus(files=str(tmp_path / "rows"), split="all"))) == ["one", "two", "three"]
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "several"))
    assert texts_of(Corpus.open(config.Corpus(files=str(tmp_path / "several"), dataset_split="test", split="all"))) == ["two"]
    with pytest.raises(DatasetError, match="has the splits train, test, not 'dev'"):
        Corpus.open(config.Corpus(files=str(tmp_path / "several"), dataset_split="dev"))


def test_another_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is a folder, and none of datasets.save_to_disk; name its files, as in .*/\*\.jsonl"):
        Corpus.open(config.Corpus(files=str(tmp_path)))


CARD = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*.jsonl}
  - {split: test, path: data/test.jsonl}
---
"""
PROGRAM = """
import json, sys
from noise.storage import DatasetError
from pipeline import config
from pipeline.corpus import Corpus
for fields in json.loads(sys.argv[1]):
    try:
        corpus = Corpus.open(config.Corpus(split="all", **fields))
        print(json.dumps([corpus.roots, [file.path for file in corpus.files], [document.text for document in corpus.documents()]]))
    except DatasetError as error:
        print(json.dumps(str(error)))
"""


def on_the_hub(home: Path, endpoint: str, *recipes: dict[str, str], **more: str) -> list[object]:
    """What a process of its own makes of each recipe, since the hub's client reads its address when it is imported."""
    settings = {"HF_ENDPOINT": f"http://{endpoint}", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **more}
    command = [sys.executable, "-c", PROGRAM, json.dumps(recipes)]
    done = subprocess.run(command, env=environment() | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub_gives_a_split_by_name_at_a_commit_and_files_by_address(tmp_path: Path) -> None:
    there = {
        "README.md": CARD,
        "data/train-0.jsonl": lines("one", "two"),
        "data/train-1.jsonl": lines("three"),
        "data/test.jsonl": lines("four"),
    }
    with serving(Hub, there) as (host, _):
        train, test, addressed, no_split, no_dataset = on_the_hub(
            tmp_path,
            host,
            {"dataset": DATASET},
            {"dataset": DATASET, "dataset_split": "test"},
            {"files": f"hf://datasets/{DATASET}@{COMMIT}/data/*-1.jsonl"},
            {"dataset": DATASET, "dataset_split": "dev"},
            {"dataset": "someone/else"},
        )
    root = f"hf://datasets/{DATASET}@{COMMIT}/data"
    assert train == [[root], ["train-0.jsonl", "train-1.jsonl"], ["one", "two", "three"]]
    assert test == [[root], ["test.jsonl"], ["four"]]
    assert addressed == [[root], ["train-1.jsonl"], ["three"]]
    assert no_split == "corpus.dataset 'someone/data' has no split 'dev'; it has train, test: set corpus.dataset_split"
    assert str(no_dataset).startswith("corpus.dataset 'someone/else': the hub did not say which files it has")


def test_a_hub_that_does_not_answer_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    with serving(Hub, {}) as (host, _):
        pass  # nobody listens there any more
    (by_address,) = on_the_hub(tmp_path, host, {"files": f"hf://datasets/{DATASET}/*.jsonl"})
    (by_name,) = on_the_hub(tmp_path, host, {"dataset": DATASET}, HF_HUB_OFFLINE="1")
    assert "(without a network, download them and name them in corpus.files)" in str(by_name)
    assert str(by_address).startswith("corpus.files: 'hf://datasets/someone/data/*.jsonl' cannot be listed")
