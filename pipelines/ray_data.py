"""The settings under which every stage runs Ray Data: nothing printed on the way, errors as they were raised."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext


@contextmanager
def quiet_ray_data(stall_seconds: float) -> Iterator[None]:
    """For datasets that are made and consumed inside the block: no progress bars, plans or tracebacks on the console
    (they go to Ray Data's log file alone), no failed block tolerated, the original exception instead of a wrapped one,
    and an error when no unit of work finishes for `stall_seconds`.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = stall_seconds
    consoles = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [console.level for console in consoles]
    for console in consoles:
        console.setLevel(logging.CRITICAL + 1)
    try:
        with DataContext.current(context):
            yield
    finally:
        for console, level in zip(consoles, levels, strict=True):
            console.setLevel(level)
