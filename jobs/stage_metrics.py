"""How far a command is, as metrics of Ray: units done and planned of every stage that shows its progress.

The session of Ray that a command runs on (jobs/ray_session.py) has them exported; without one, progress is only shown.
"""

import contextlib
from collections.abc import Callable, Iterator

from pipelines.log_line import own_fields

DONE, PLANNED = "blt_stage_units", "blt_stage_units_planned"
TAGS = ("stage", "unit", "run")

Advance = Callable[[int], None]

_begin_stage: Callable[[str, str, int | None], Advance] | None = None


@contextlib.contextmanager
def exported_stages() -> Iterator[None]:
    """Stages that begin within the block have metrics. Ray must be initialised."""
    from ray.util.metrics import Counter, Gauge  # not for commands that need no Ray

    global _begin_stage
    done = Counter(DONE, "Units of a stage that are done.", TAGS)
    planned = Gauge(PLANNED, "Units of a stage in all.", TAGS)

    def begin(stage: str, unit: str, total: int | None) -> Advance:
        tags = {"stage": stage, "unit": unit, "run": str(own_fields()["run"])}
        if total is not None:
            planned.set(total, tags)

        def advance(count: int) -> None:
            if count > 0:  # a counter takes no other
                done.inc(count, tags)

        return advance

    before, _begin_stage = _begin_stage, begin
    try:
        yield
    finally:
        _begin_stage = before


def begin_stage(stage: str, unit: str, total: int | None) -> Advance:
    """A stage begins; what is returned takes the units that are done since the last call."""
    return _begin_stage(stage, unit, total) if _begin_stage is not None else lambda count: None
