"""100,000 shards of 1,000 sources, simulated: plans, manifests, commits, index and order in bounded time and memory.

Times are CPU seconds of one process, so that others on the machine have little say, and bounds leave room: they are for
what grows with the square of the shards, or with shards times sources. Figures are in docs/scale.md.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.scale_case import measure

ROOT = Path(__file__).parent.parent.parent
MOST_SECONDS = 3.0
"""Of a stage."""
MOST_SECONDS_OF = {"plan of blt shard": 8.0}
MOST_MEMORY_BYTES = 1.2e9
GROWTH = 8.0
"""Most that a stage may take of four times the shards: 4 if it is linear, 16 if it is quadratic."""


def measured(num_shards: int, num_sources: int) -> Any:
    """In a process of its own, whose memory is nobody else's."""
    command = [sys.executable, "-m", "tests.pipelines.scale_case", str(num_shards), str(num_sources)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_every_stage_agrees_with_the_others(tmp_path: Path) -> None:
    """What `measure` asserts, for fewer shards."""
    assert len(measure(2000, 20, str(tmp_path))) == 14


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_shards() -> None:
    quarter, whole = measured(25_000, 1000), measured(100_000, 1000)
    assert whole["memory_bytes"] < MOST_MEMORY_BYTES
    for stage, seconds in whole["seconds"].items():
        assert seconds < MOST_SECONDS_OF.get(stage, MOST_SECONDS), stage
        # Below, a clock's granularity and caches have their say.
        assert seconds < max(GROWTH * quarter["seconds"][stage], 0.5), stage
