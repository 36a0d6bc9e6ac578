"""The test vectors of docs/format.md: read by a reader that imports nothing of this project, then by ours, and never changed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from noise import philox
from noise.dataset import Manifest, open_shard
from noise.decode import decode
from noise.sketch import Sketch
from tests.noise import make_vectors, second_reader

VECTORS = Path(__file__).parents[1] / "vectors"
ROOT_HASHES = {
    "version-1": "b0e26ad389c733e9dcdbb78129efdbaf99a021684dcc51e740e164d12d2c8c8d",
    "version-2": "6f34e960fee32b6d1769e926c55a7deb0ce6954c8324a03900197135fe04940b",
    "version-2-zstd": "8edc5ced9e8435968f8605f99eadba6ee06cd41c631ae58e7276c19319876e5c",
    "version-2-packed": "3de767202bcd4f2051bca0f9842dc5f84c9df49d1f5238bd77e1f2f1370abfb6",
}
"""What names them for ever."""


def expected(name: str) -> dict[tuple[int, int, int, int], dict[str, Any]]:
    """By (shard, row, position, draw); `entries` are those whose words and noise are listed."""
    found = json.loads((VECTORS / ("packed.json" if name == "version-2-packed" else "noise.json")).read_text())
    return {(place["shard"], place["row"], place["position"], place["draw"]): {"entries": list(range(11))} | place for place in found}


@pytest.mark.parametrize("name", ROOT_HASHES)
def test_a_reader_of_the_page_alone_finds_the_noise(name: str) -> None:
    seen, places = set(), expected(name)
    for number, shard in enumerate(second_reader.read_dataset(VECTORS / name)):
        for row in range(len(shard.columns["length"])):
            for draw in range(shard.metadata["draws"]):
                for n, g_V in enumerate(second_reader.noise_of_row(shard, row, draw)):
                    place = places[number, row, n + 1, draw]
                    assert np.allclose(g_V[place["entries"]], place["g"], rtol=0, atol=1e-12)
                    assert shard.columns["input_ids"][row, n + 1] == place["token"] and int(place["sequence_id"]) == shard.columns["sequence_id"][row]
                    seen.add((number, row, n + 1, draw))
    assert seen == places.keys() and len(seen) > 5


@pytest.mark.parametrize("name", ROOT_HASHES)
def test_our_own_reader_finds_it_within_float32(name: str) -> None:
    manifest, listed = Manifest.read(VECTORS / name), expected(name)
    assert manifest.root_hash == ROOT_HASHES[name]
    for receipt in manifest.receipts:
        reader = open_shard(VECTORS / name, receipt, manifest.identity)
        for rows in reader:
            has_BL = rows.has_noise("parallel")
            row_N, position_N = has_BL.nonzero()
            sequence_N = torch.from_numpy(rows.sequence_id.view(np.int64).copy())[torch.from_numpy(row_N)]
            columns = ((rows.log_prob[has_BL], np.float32), (rows.kept[has_BL], np.int64), (rows.index, np.int64), (rows.code, np.int64))
            sketch = Sketch(*(torch.from_numpy(column.astype(kind)) for column, kind in columns))
            token_N = torch.from_numpy(rows.input_ids[has_BL].astype(np.int64))
            for draw in range(reader.metadata.draws):
                rows_N5 = philox.rows(int(reader.metadata.seed), sequence_N, torch.from_numpy(position_N), draw)
                g_NV = decode(sketch, token_N, rows_N5, reader.metadata.codec).numpy()
                words_NV = philox.words(rows_N5, reader.metadata.vocab_size).numpy()
                for n, (row, position) in enumerate(zip(row_N, position_N, strict=True)):
                    place = listed[receipt.shard, int(row), int(position), draw]
                    assert words_NV[n, place["entries"]].tolist() == place["words"]
                    assert np.abs(g_NV[n, place["entries"]] - np.array(place["g"])).max() < 1e-5


def test_a_large_vocabularys_entries_are_packed_as_the_page_says() -> None:
    for place in expected("version-2-packed").values():
        assert place["kept"] == sorted(set(place["kept"])) and set(place["kept"]) <= set(place["entries"])
    batch = pa.ipc.open_file((VECTORS / "version-2-packed" / "shards" / "00000.arrow").read_bytes()).get_batch(0)
    entry = batch["entry"].flatten().to_numpy()
    places = expected("version-2-packed").values()
    assert (entry >> 8).tolist() == [index for place in places for index in place["kept"]] and len(entry) > 10
    assert (entry & 255).tolist() == [code for place in places for code in place["code"]]


def test_the_worked_example_is_the_stream_round_by_round() -> None:
    example = json.loads((VECTORS / "stream.json").read_text())
    assert example == make_vectors.stream()
    place = philox.rows(int(example["seed"]), torch.tensor([int(example["sequence_id"])]), torch.tensor([example["position"]]), example["draw"])
    assert [f"{word:08x}" for word in place[0, [2, 3, 4]].tolist()] == example["counter"][1:]
    assert philox.words(place, 4)[0].tolist() == [entry["word"] for entry in example["entries"]] == [int(word, 16) for word in example["rounds"][-1]]
    for entry in example["entries"] + example["edges"]:
        v = philox.uniform(torch.tensor([entry["word"]]))
        assert struct.pack(">f", float(v)).hex() == entry["v_bits"]
        assert abs(float(philox.exponential(torch.tensor([entry["word"]]))) / entry["E"] - 1) < 3e-7


def test_the_page_prints_the_worked_example_as_it_is() -> None:
    page = (VECTORS.parents[1] / "docs" / "format.md").read_text()
    example = json.loads((VECTORS / "stream.json").read_text())
    for words in (example["counter"], example["key"], example["rounds"][0], example["rounds"][1], example["rounds"][-1]):
        assert " ".join(words) in page
    for entry in example["entries"]:
        assert f"{entry['word']}" in page and entry["v_bits"] in page and f"{entry['E']:.10g}" in page and f"{entry['g']:.10g}" in page
