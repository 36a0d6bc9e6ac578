"""run.jsonl: every line has its hash, whatever stopped its writer; a log of anybody's is read or skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noise.folder import Folder
from noise.storage import DatasetError
from pipeline.run_log import NAME, RunLog, State, examine, last_run
from pipeline.status import Status


def logged(folder: Path, *events: str) -> bytes:
    with RunLog(folder) as log:
        for event in events:
            log.write(event, shard=3, reason='a "quoted" one, caf\u00e9')
    return (folder / NAME).read_bytes()


@pytest.mark.parametrize("events", [["begin"], ["begin", "end"]])
def test_a_changed_byte_is_found_in_a_log_of_any_length_and_its_line_named(tmp_path: Path, events: list[str]) -> None:
    whole = logged(tmp_path, *events)
    assert examine(whole) == State(True)
    for at in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            state = examine(bytes(changed))
            assert state.damaged == whole[:at].count(b"\n") + 1, (at, bit)


def test_a_log_that_was_cut_off_anywhere_is_whole_as_far_as_it_goes_and_the_next_driver_goes_on(tmp_path: Path) -> None:
    whole = logged(tmp_path, "begin", "end")
    first = whole.index(b"\n") + 1
    for stop in range(first, len(whole)):
        assert examine(whole[:stop]) == State(True, 0, stop > first)
    (tmp_path / NAME).write_bytes(whole[:-1])
    RunLog(tmp_path)
    assert (tmp_path / NAME).read_bytes() == whole
    (tmp_path / NAME).write_bytes(whole[:-30])
    assert [json.loads(line)["event"] for line in logged(tmp_path, "begin").splitlines()] == ["begin", "begin"]
    assert examine((tmp_path / NAME).read_bytes()) == State(True)


def test_lines_of_a_time_before_hashes_get_theirs_when_a_driver_goes_on_and_damaged_ones_do_not(tmp_path: Path) -> None:
    old = b'{"event": "begin", "time": 1.0}\n\n{"event": "end", "time": 2.0} \n{"event": "sha'
    (tmp_path / NAME).write_bytes(old)
    assert examine(old) == State(False)
    RunLog(tmp_path)
    mended = (tmp_path / NAME).read_bytes()
    assert examine(mended) == State(True) and mended.count(b"\n") == 2
    (tmp_path / NAME).write_bytes(mended + b'{"event": "begin", "time": 3.0}\n')  # by an older driver
    RunLog(tmp_path)
    assert examine((tmp_path / NAME).read_bytes()) == State(True)
    changed = mended.replace(b"1.0", b"1.5")
    (tmp_path / NAME).write_bytes(changed)
    RunLog(tmp_path)
    assert (tmp_path / NAME).read_bytes() == changed and examine(changed).damaged == 1


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "data" / NAME).symlink_to(tmp_path / "outside")
    with pytest.raises(DatasetError, match=r"run\.jsonl is a link"):
        logged(tmp_path / "data", "begin")
    assert (tmp_path / "outside").read_text() == "mine"


EVENT = st.dictionaries(
    st.sampled_from(["event", "time", "receipt", "reason", "x"]),
    st.one_of(
        st.sampled_from(["begin", "shard", "shard failed", "end"]), st.floats(), st.integers(), st.none(), st.text(max_size=5),
        st.dictionaries(st.sampled_from(["tokens", "x"]), st.one_of(st.integers(), st.text(max_size=3))),
    ),
)  # fmt: skip


@given(st.lists(st.one_of(st.binary(max_size=40), EVENT.map(lambda event: json.dumps(event).encode()), st.just(b"[" * 3000)), max_size=6))
def test_a_log_of_anybodys_is_read_or_skipped(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("log")
    (folder / NAME).write_bytes(b"\n".join(lines))
    events = last_run(Folder.of(folder))
    status = Status(1, [], False, 0, 1, events)
    status.rate()
    assert all(isinstance(event["event"], str) for event in events)
    RunLog(folder)
    examine((folder / NAME).read_bytes())
