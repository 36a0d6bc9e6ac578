"""Keys and tokens are neither kept nor shown: every byte that a command leaves is searched for sentinels in addresses and environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from noise import stores
from noise.folder import Folder
from noise.secrets import redacted, refuse_secrets
from noise.storage import DatasetError
from pipeline.__main__ import main
from pipeline.progress import printable
from pipeline.run_log import RunLog
from tests.noise.s3 import Bucket, bucket
from tests.pipeline.world import World
from tests.trainer.chain import write_chain
from trainer.__main__ import main as train

__all__ = ["bucket"]

SENTINEL = "SENTINELsentinel0123456789"
ADDRESSES = [
    f"s3://AKIDEXAMPLE:{SENTINEL}@bucket/folder",
    f"s3://{SENTINEL}@bucket/folder",
    f"s3://bucket/folder?region=x&secret_key={SENTINEL}",
    f"s3://bucket/folder?endpoint_override=https://me:{SENTINEL}@host:9000",
    f"s3://bucket/folder?endpoint_override=me:{SENTINEL}@host:9000&scheme=http",
    f"gs://bucket/folder?access_token={SENTINEL}",
    f"https://host/file.txt?X-Amz-Signature={SENTINEL}",
    f"https://me:{SENTINEL}@host/file.txt",
    f"hf://{SENTINEL}@datasets/owner/name",
]


def left_behind(root: Path) -> str:
    """Everything in a folder, names too."""
    return "".join(f"{path}\n" + (path.read_bytes().decode("latin1") if path.is_file() else "") for path in root.rglob("*"))


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_credentials_is_refused_wherever_one_can_be_given_and_not_repeated(address: str) -> None:
    from pipeline.config import Corpus, Teacher

    for use in (Folder.of, lambda text: Corpus(files=text), lambda text: Corpus(files=["a.txt", text]), lambda text: Teacher(model=text)):
        with pytest.raises(DatasetError, match="credentials") as error:
            use(address)
        assert SENTINEL not in str(error.value)


def test_no_command_keeps_or_repeats_credentials_that_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_chain(tmp_path / "data", rows=4, shards=1), str(tmp_path / "out")
    for address, command in zip(
        ADDRESSES,
        [
            ["extract", "--noise.extraction", "none", "--output", out, "--corpus.files"],
            ["extract", "--noise.extraction", "none", "--output"],
            ["extract", "--output", out, "--teacher.model"],
            ["verify"], ["inspect"], ["inspect", "--trust"], ["status"], ["replay"], ["plan", "--output", out, "--corpus.files"],
        ],
        strict=True,
    ):  # fmt: skip
        assert main([*command, address]) == 2, command
    assert train(["--output", out, "--data.path", ADDRESSES[0]]) == 1
    assert train(["--output", out, "--data.path", str(data), "--data.heldout", ADDRESSES[2], "--device", "cpu", "--threads", "1"]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("credentials") >= 11
    assert SENTINEL not in shown.out + shown.err + left_behind(tmp_path)


def test_credentials_in_the_environment_reach_no_object_no_line_and_no_error(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SENTINEL)
    stores.client.cache_clear()
    world = World(tmp_path, capsys)
    assert world.run("tokenizer") == 0
    there = bucket.uri("data")
    assert world.run("extract", noise__extraction="none", output=there, packing__shard_characters=10**6) == 0
    assert main(["verify", there]) == 0 and main(["inspect", there]) == 0 and main(["inspect", there, "--json"]) == 0
    assert main(["status", there]) == 0 and main(["inspect", there, "--trust"]) == 0
    bucket.fail(403, "GET", "manifest", times=50)
    assert main(["verify", there]) == 3
    kept = b"".join(bucket.objects.values()).decode("latin1")
    shown = capsys.readouterr()
    assert {"README.md", "manifest.json", "plan.json", "recipe.yaml", "run.jsonl"} <= set(bucket.under("data"))
    assert SENTINEL not in kept + shown.out + shown.err + left_behind(tmp_path)


def test_a_library_that_quotes_a_secret_in_its_error_is_cleaned_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", SENTINEL)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "keys/key.json")
    quoted = f"401 for Bearer {SENTINEL} at https://me:{SENTINEL}@host/x?a=1&token={SENTINEL}&b=2, see keys/key.json"
    clean = "401 for Bearer *** at https://***@host/x?a=1&token=***&b=2, see keys/key.json"
    assert redacted(quoted) == printable(quoted) == clean
    assert SENTINEL not in str(stores.in_words(OSError(quoted), "s3://bucket"))
    with RunLog(tmp_path) as log:
        log.write("shard failed", reason=quoted)
    (line,) = (tmp_path / "run.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == clean


def test_addresses_without_credentials_are_left_alone() -> None:
    for address in (
        "s3://bucket/folder?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1",
        "hf://datasets/owner/name@main/data/*.parquet",
        "texts/me@work/token=1/x.txt",
        "gs://bucket/tokens/secret.txt",
        "owner/model",
    ):
        refuse_secrets("x", address)
        assert redacted(address) == address
    with pytest.raises(DatasetError, match=r"s3://\*\*\*@bucket/x: an address with credentials is refused"):
        Folder.of(f"s3://me:{SENTINEL}@bucket/x")
