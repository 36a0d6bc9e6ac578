"""A dataset's card: what it teaches works as it stands there, what nobody said is called so, and saying it changes no shard."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from noise.dataset import Manifest
from noise.folder import Folder
from pipeline.__main__ import main
from pipeline.rewrite import convert
from pipeline.trust import licence
from pipeline.verify import verify
from tests.pipeline.test_transfer import dataset as made_here
from trainer.data import NoiseDataset

dataset = made_here


def reader(card: str) -> dict[str, object]:
    """What the card's own Python defines."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 34 and "import noise" not in code
    defined: dict[str, object] = {}
    exec(code, defined)
    return defined


@pytest.mark.parametrize("version", [2, 1])
def test_the_cards_reader_rebuilds_the_noise(dataset: Path, tmp_path: Path, version: int) -> None:
    folder = dataset
    if version == 1:
        folder = tmp_path / "old"
        convert(dataset, folder, 1)
    code = reader((folder / "README.md").read_text())
    table = code["shard"](str(folder / "shards" / "00001.arrow"))  # type: ignore[operator]
    ours = NoiseDataset(folder)
    first = Manifest.read(folder).receipts[0].rows
    for row, t in ((0, 1), (1, 5), (2, 3)):
        batch = ours.batch(np.array([first + row]))
        wanted = batch.noise_at(torch.tensor([t]))[0].double().numpy()
        found = code["noise"](table, row, t)  # type: ignore[operator]
        assert np.abs(found - wanted).max() < 1e-5 and (found + 0).argmax() == wanted.argmax()


def test_licences_are_asked_for_and_never_made_up(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(dataset), "--output", str(tmp_path / "there")]) == 0
    assert "states no licence of the text" in capsys.readouterr().err
    card = (tmp_path / "there" / "README.md").read_text()
    assert "Licence of the text: not stated. Licence of the teacher: not stated." in card and "license:" not in card.split("---")[1]
    before = Manifest.read(tmp_path / "there")
    assert main(["card", str(tmp_path / "there"), "--title", "Garden noise", "--corpus_license", "cc-by-4.0", "--teacher_license", "mit"]) == 0
    card = (tmp_path / "there" / "README.md").read_text()
    assert "# Garden noise" in card and "Licence of the text: cc-by-4.0. Licence of the teacher: mit." in card and "shards/**/*.arrow" in card
    assert verify(tmp_path / "there") == before
    assert [licence(Folder.of(tmp_path / "there"), field) for field in ("license", "teacher_license")] == [
        "cc-by-4.0, the card says",
        "mit, the card says",
    ]
    assert main(["card", str(tmp_path / "there"), "--teacher_license", "other"]) == 0
    assert "Licence of the text: cc-by-4.0. Licence of the teacher: other." in (tmp_path / "there" / "README.md").read_text()
