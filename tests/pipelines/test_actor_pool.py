"""The pool's errors, in a real Ray: what they say, and that whoever keeps one does not keep the actors."""

from collections.abc import Mapping
from typing import Any

import pytest
import ray

from blt.errors import DataError
from pipelines.actor_pool import ActorPoolConfig, run_units
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

PATIENCE_SECONDS = 60.0


class Halving:
    """Halves even numbers; an odd one is an error, of ours or another."""

    def __init__(self, *, ours: bool) -> None:
        self._ours = ours

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        (number,) = batch["number"]
        if number % 2:
            raise DataError(f"{number} is odd") if self._ours else ValueError(f"{number} is odd")
        return {"half": [number // 2]}


def halves(numbers: list[int], *, ours: bool = True) -> list[int]:
    units = [{"number": number} for number in numbers]
    return sorted(int(row["half"]) for row in run_units(units, Halving, {"ours": ours}, ActorPoolConfig()))


def test_every_unit_is_answered() -> None:
    assert halves(list(range(0, 400, 2))) == list(range(200))
    assert halves([]) == []


@pytest.mark.parametrize("ours", [True, False])
def test_an_error_names_its_cause_and_keeps_no_actor(ours: bool) -> None:
    wait_for(_all_cpus_are_free, "the actors of earlier tests to end", seconds=PATIENCE_SECONDS)
    with pytest.raises(DataError if ours else ValueError, match="7 is odd") as raised:
        halves([2, 4, 7], ours=ours)
    assert ("\n" in str(raised.value)) == (not ours), "ours is one line, another comes with the actor's traceback"
    wait_for(_all_cpus_are_free, "its actors to end", seconds=PATIENCE_SECONDS)


def _all_cpus_are_free() -> bool:
    return ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
