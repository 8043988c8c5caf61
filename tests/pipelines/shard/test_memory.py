"""Memory of reading and writing a group does not grow with its files or its lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.shard.corpora import zstd

_MEASURE = """
import sys
from pathlib import Path
from pipelines.shard import ShardConfig, plan_corpus
from pipelines.shard.duplicates import Duplicates
from pipelines.shard.group import write_group
from pipelines.storage import Storage
config = ShardConfig(input=(sys.argv[1],), group_bytes=2**22, shard_bytes=2**21, max_line_bytes=2**21)
def kib(name):  # of this process alone: getrusage counts what it was forked from as well
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
(group,) = plan_corpus(config).groups
storage = Storage(sys.argv[2])
started = kib("VmRSS")
receipt = write_group(group, config, storage, Duplicates(0, 1, 0, storage))
print(receipt.counts.bytes, receipt.counts.quarantined, kib("VmHWM") - started)
"""


def _measure(corpus: Path, output: Path) -> tuple[int, int, int]:
    """Text bytes, quarantined rows and MiB by which the peak grew in a process that shards one file."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", _MEASURE, str(corpus), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    text_bytes, quarantined, grown_kib = map(int, result.stdout.split())
    return text_bytes, quarantined, grown_kib // 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "line"])
def test_memory_is_bounded_for_a_large_compressed_file_and_a_large_line(tmp_path: Path, kind: str) -> None:
    """80 MB of text with 4 MB held: 25 MiB were measured for documents, 8 for one line, and the same for 200 MB."""
    good = (json.dumps({"text": "good " * 2000}) + "\n").encode()
    large = good * 8_000 if kind == "file" else good + b'{"text": "' + b"x" * 80_000_000 + b'"}\n' + good
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(large))
    text_bytes, quarantined, grown = _measure(tmp_path / "a.jsonl.zst", tmp_path / "out")
    assert (text_bytes, quarantined) == ((80_000_000, 0) if kind == "file" else (20_000, 1))
    assert grown < 60
