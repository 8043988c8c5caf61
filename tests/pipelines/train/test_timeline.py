"""The timeline of a run on disk: what was told comes back in order, whatever was interrupted."""

from pathlib import Path

import pytest

from blt.errors import DataError
from pipelines.train import timeline
from pipelines.train.timeline import TIMELINE_NAME, Event, Joined, Saved, Started, Step, TimelineWriter, read_timeline

ENTRIES = [
    Started(at=1.5),
    Joined(at=2.0, worker="ab", step=0),
    Step(at=3.0, step=1, workers=2, sequences="00ff", loss=2.5, seconds=0.5, paused_seconds=0.25, tries=2),
    Event(at=3.5, cause="preemption", detail='node "x"'),
    Saved(at=4.0, step=1, blocked_seconds=0.1, seconds=0.5),
]


def test_entries_come_back_across_writers_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "ENTRIES_PER_FILE", 3)
    for part in (ENTRIES[:1], ENTRIES[1:4], ENTRIES[4:]):
        writer = TimelineWriter(tmp_path)
        for entry in part:
            writer.write(entry)
        writer.close()
    assert list(read_timeline(str(tmp_path))) == ENTRIES
    assert [path.name for path in sorted((tmp_path / TIMELINE_NAME).iterdir())] == ["00000000.jsonl", "00000001.jsonl"]


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    writer = TimelineWriter(tmp_path)
    writer.write(ENTRIES[0])
    writer.close()
    (path,) = (tmp_path / TIMELINE_NAME).iterdir()
    path.write_bytes(path.read_bytes() + b'{"kind":"event","at":2')
    assert list(read_timeline(str(tmp_path))) == ENTRIES[:1]
    writer = TimelineWriter(tmp_path)
    writer.write(ENTRIES[1])
    writer.close()
    assert list(read_timeline(str(tmp_path))) == ENTRIES[:2]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    TimelineWriter(tmp_path).close()
    (path,) = (tmp_path / TIMELINE_NAME).iterdir()
    path.write_bytes(b'{"kind":"unheard of","at":1}\n')
    with pytest.raises(DataError, match=path.name):
        list(read_timeline(str(tmp_path)))
