"""What kills did to a run: timelines and accounts in; steps to run, sameness of the curves, seconds for each kill out.

Pure. Everything that one run alone says is in its `Account`.
"""

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.train.account import Account
from pipelines.train.timeline import Step

LOSS_TOLERANCE = 1e-3
"""Relative. Sums are in another order when another number of workers does a step, and training carries that on."""


def steps_for(seconds: float, probe: Sequence[Step], skip: int) -> int:
    """Steps that take `seconds`, from those of an undisturbed run without its first `skip`, which pay for warming up;
    pauses between steps count. At least one.
    """
    assert len(probe) > skip + 1
    mean = (probe[-1].at - probe[skip].at) / (len(probe) - 1 - skip)
    return max(1, round(seconds / mean))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of the curve of a disturbed run with that of an undisturbed one."""

    same: bool
    """Every update, those made again too, saw the same sequences and had the same loss; and none is missing."""
    largest_loss_difference: float
    """Relative, over the updates of the disturbed run that both have."""
    first_difference: int | None
    """The first step that is not the same."""


def compare(undisturbed: Sequence[Step], disturbed: Sequence[Step], tolerance: float = LOSS_TOLERANCE) -> Comparison:
    """Every update that the disturbed run tells of, beside that of the other."""
    expected = {step.step: step for step in undisturbed}
    differing = set(expected) ^ {step.step for step in disturbed}
    largest = 0.0
    for step in disturbed:
        if (other := expected.get(step.step)) is None:
            continue
        difference = _loss_difference(other.loss, step.loss)
        largest = max(largest, difference)
        if step.sequences != other.sequences or not difference <= tolerance:
            differing.add(step.step)
    return Comparison(
        same=not differing and bool(expected),
        largest_loss_difference=largest,
        first_difference=min(differing, default=None),
    )


def _loss_difference(expected: float | None, found: float | None) -> float:
    """Relative; infinite where only one of the updates was made, or where a loss is not finite."""
    if expected is None or found is None:
        return 0.0 if expected is found else float("inf")
    difference = abs(found - expected) / max(abs(expected), 1e-12)
    return difference if difference == difference else float("inf")


def recovery_seconds(account: Account, steps: Sequence[Step], kills: Sequence[float]) -> list[float]:
    """Seconds that each kill cost, as the account has them. `kills`: their times, ascending, on the clock of `steps`.

    All interruptions from a kill to the next are its own. Kills without a new step between them are one, and those
    before the first interruption of the account cost nothing.
    """
    high = _highest(steps)
    struck = [high[bisect.bisect_right([at for at, _ in high], kill) - 1][1] if high else 0 for kill in kills]
    places = sorted(set(struck))
    lost: defaultdict[int, float] = defaultdict(float)
    for one in account.interruptions:
        lost[places[max(bisect.bisect_right(places, one.step) - 1, 0)] if places else 0] += one.seconds_lost
    return [round(lost[place], 3) for place in places]


def _highest(steps: Sequence[Step]) -> list[tuple[float, int]]:
    """When each step was made for the first time; ascending, from (0, step 0) on."""
    high = [(0.0, 0)]
    for step in steps:
        if step.step > high[-1][1]:
            high.append((step.at, step.step))
    return high
