"""A dataset on the Hugging Face Hub, through its own client: pushed in few commits, read, pulled, and its token kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from noise.dataset import Manifest
from noise.folder import Folder
from noise.storage import DatasetError
from pipeline.__main__ import main
from pipeline.verify import verify
from tests.noise.hub import TOKEN, Hub, hub
from tests.pipeline.test_transfer import dataset
from trainer.data import NoiseDataset

__all__ = ["dataset", "hub"]
THERE = "hf://datasets/me/noise"


def test_a_dataset_goes_there_and_back(dataset: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(dataset), "--output", THERE, "--dry-run"]) == 0 and not hub.repos
    assert main(["push", str(dataset), "--output", THERE]) == 0
    manifest = Manifest.read(dataset)
    assert len(hub.commits) == 1 and len(hub.uploads) == len(manifest.receipts) and "shards/00000/00000.arrow" in hub.repos["me/noise"]
    assert Manifest.read(THERE).root_hash == manifest.root_hash and main(["inspect", THERE]) == 0
    assert main(["verify", THERE]) == 0 and main(["pull", THERE, "--output", str(tmp_path / "here")]) == 0
    assert verify(tmp_path / "here").root_hash == manifest.root_hash and len(NoiseDataset(tmp_path / "here")) == manifest.totals["rows"]
    said = capsys.readouterr()
    written = [path.read_bytes() for path in (tmp_path / "here").rglob("*") if path.is_file()] + list(hub.repos["me/noise"].values())
    assert TOKEN not in said.out + said.err and not any(TOKEN.encode() in content for content in written)


def test_a_push_that_broke_off_sends_only_what_is_missing(dataset: Path, hub: Hub) -> None:
    manifest = Manifest.read(dataset)
    hub.broken = manifest.receipts[-1].sha256
    assert main(["push", str(dataset), "--output", THERE]) != 0
    assert not hub.commits and manifest.receipts[-1].sha256 not in hub.uploads
    hub.broken, sent = "", len(hub.uploads)
    assert main(["push", str(dataset), "--output", THERE]) == 0
    assert len(hub.uploads) == len(manifest.receipts) and sent and len(set(hub.uploads)) == len(hub.uploads)


def test_some_shards_and_a_revision_are_pulled(dataset: Path, hub: Hub, tmp_path: Path) -> None:
    assert main(["push", str(dataset), "--output", THERE]) == 0
    assert main(["pull", THERE + "@main", "--shards", "0", "--output", str(tmp_path / "some")]) == 0
    assert len(verify(tmp_path / "some").receipts) == 1
    with pytest.raises(DatasetError, match="there is no revision elsewhere"):
        Manifest.read(THERE + "@elsewhere")


def test_students_read_it_straight_from_there(dataset: Path, hub: Hub, tmp_path: Path) -> None:
    assert main(["push", str(dataset), "--output", THERE]) == 0
    ours, theirs = NoiseDataset(THERE, cache=tmp_path / "cache"), NoiseDataset(dataset)
    rows = np.arange(len(theirs))
    assert torch.equal(ours.batch(rows).input_ids_BL, theirs.batch(rows).input_ids_BL)
    assert torch.equal(ours.batch(rows).noise_at(torch.arange(1, 9)), theirs.batch(rows).noise_at(torch.arange(1, 9)))
    assert {path.suffix for path in (tmp_path / "cache").iterdir() if path.name != "lock"} == {".arrow"}


def test_what_is_not_there_or_not_yours_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist, or is private and needs a token"):
        Manifest.read("hf://datasets/me/nothing")
    with pytest.raises(DatasetError, match="named hf://datasets/OWNER/NAME"):
        Folder.of("hf://me/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(DatasetError, match=r"token|hub says"):
        Manifest.read("hf://datasets/me/nothing")
    assert main(["extract", "--output", THERE]) == 2
