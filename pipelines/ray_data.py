"""The settings under which every stage runs Ray Data: nothing printed on the way, errors as they were raised."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext

_CONSOLE_LEVELS = {
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,  # warns that the progress bars are off, as they are meant to be
}


@contextmanager
def quiet_ray_data(stall_seconds: float) -> Iterator[None]:
    """For datasets that are made and consumed inside the block: no progress bars or plans on the console (warnings do
    pass), no failed block tolerated, the original exception instead of a wrapped one, and an error when no unit of work
    finishes for `stall_seconds`.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = stall_seconds
    before = {name: logging.getLogger(name).level for name in _CONSOLE_LEVELS}
    for name, level in _CONSOLE_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    try:
        with DataContext.current(context):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
