"""Standard output whose reader goes away, as that of `blt ... | head` does: the command ends without a word.

Python tells of it by a BrokenPipeError, and rich by a SystemExit that follows one; but connections between processes
break too, and those are failures.
"""

import os
import select
import signal
import sys
from typing import TextIO

READER_GONE = 128 + signal.SIGPIPE
"""Exit status: what a shell gives for a command that ends by this signal, as others do."""


def reader_is_gone(error: BaseException) -> bool:
    """Whether `error` says that nobody reads standard output any more."""
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and _is_unread(sys.stdout)


def discard_output() -> None:
    """Send to nowhere what is left to be written, which the end of the process would complain about."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _is_unread(stream):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe or socket without a reader."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except OSError:  # no file at all, as in tests
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
