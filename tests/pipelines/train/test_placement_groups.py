"""What a failed try of Ray Train reserved is given back, and nothing else."""

import time

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from pipelines.train.trainer import _placement_groups_removed

PATIENCE_SECONDS = 60.0


def state(group: PlacementGroup) -> str:
    return str(placement_group_table(group)["state"])


def fail_with(reserved: list[PlacementGroup], cpus: int) -> None:
    with _placement_groups_removed():
        reserved.append(placement_group([{"CPU": 1}] * cpus))
        ray.get(reserved[0].ready())
        raise RuntimeError("the start failed")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_failed_try_gives_its_cpus_back() -> None:
    """All CPUs again: the next try would wait for them for ever."""
    cpus = int(ray.cluster_resources()["CPU"])
    others = placement_group([{"CPU": 1}])
    ray.get(others.ready())
    try:
        with pytest.raises(RuntimeError, match="the start failed"):
            fail_with(left := [], cpus - 1)
        assert state(left[0]) == "REMOVED"
        assert state(others) == "CREATED"
        with _placement_groups_removed():
            kept = placement_group([{"CPU": 1}] * (cpus - 1))
            assert kept.wait(PATIENCE_SECONDS)
        assert state(kept) == "CREATED"
        remove_placement_group(kept)
    finally:
        remove_placement_group(others)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while ray.available_resources().get("CPU", 0) < cpus:
        assert time.monotonic() < deadline, "the CPUs are not given back"
        time.sleep(0.05)
