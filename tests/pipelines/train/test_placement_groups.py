"""What a failed try of Ray Train reserved is given back, and nothing else."""

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from pipelines.train.trainer import _placement_groups_removed
from tests.waiting import wait_for

PATIENCE_SECONDS = 60.0


def state(group: PlacementGroup) -> str:
    return str(placement_group_table(group)["state"])


def free_cpus() -> int:
    return int(ray.available_resources().get("CPU", 0))


def fail_with(reserved: list[PlacementGroup], cpus: int) -> None:
    with _placement_groups_removed():
        reserved.append(placement_group([{"CPU": 1}] * cpus))
        assert reserved[0].wait(PATIENCE_SECONDS)
        raise RuntimeError("the start failed")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_a_failed_try_gives_its_cpus_back() -> None:
    """All CPUs again: the next try would wait for them for ever."""
    cpus = int(ray.cluster_resources()["CPU"])
    wait_for(lambda: free_cpus() >= cpus, "the actors of earlier tests to end", seconds=PATIENCE_SECONDS)
    others = placement_group([{"CPU": 1}])
    assert others.wait(PATIENCE_SECONDS)
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
    wait_for(lambda: free_cpus() >= cpus, "the CPUs to be given back", seconds=PATIENCE_SECONDS)
