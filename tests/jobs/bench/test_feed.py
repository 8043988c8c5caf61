"""`blt bench feed`: one small run gives every figure, on a dataset that is given and on one that is made."""

import json

import pytest

from blt.errors import ConfigError
from jobs.bench.feed import GOALS, Config, run
from pipelines.train.config import TrainConfig

TRAIN = TrainConfig(steps=1, global_batch=4, micro_batch=2, sequence_bytes=256, sequence_patches=64)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_every_figure_is_there() -> None:
    figures = json.loads(run(Config(train=TRAIN, repeats=2, resumes=3, bytes=400_000)).to_json())
    assert figures["status"] == "done"
    assert figures["goals"] == GOALS
    for name in GOALS:
        assert figures[name]["median"] > 0, name
    for name in ("feed_bytes_per_cpu_second", "assembled_alone_bytes_per_cpu_second"):
        assert len(figures[name]["repeats"]) == 2
    assert figures["configuration"]["train"]["sequence_bytes"] == 256


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="repeats must be at least 1, got 0"):
        Config(repeats=0)
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        Config(steps=0)
    with pytest.raises(ConfigError, match="rank must lie between 0 and world_size - 1 = 1, got 2"):
        Config(rank=2, world_size=2)
