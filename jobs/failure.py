"""What to tell the user of an exception: one line for what a user can mend, however deep in Ray it is wrapped."""

from collections.abc import Iterator

from blt.errors import BltError, ConfigError


def mendable(error: BaseException) -> BltError | OSError | None:
    """The BltError, else the OSError, that the exception is or wraps; None for a bug."""
    found = list(_wrapped(error, set()))
    project = (e for e in found if isinstance(e, BltError))
    # Connections and timeouts between the processes are OSErrors too, but nothing that a file's name would explain.
    system = (e for e in found if isinstance(e, OSError) and not isinstance(e, ConnectionError | TimeoutError))
    return next(project, None) or next(system, None)


def exit_status(error: BltError | OSError) -> int:
    """2 for a configuration that cannot be used, 1 for all else."""
    return 2 if isinstance(error, ConfigError) else 1


def message(error: BltError | OSError) -> str:
    """The error in one line: an OSError as "FILE: what the system says"."""
    if isinstance(error, BltError):
        return " ".join(str(error).split())
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return " -> ".join(names) + (": " if names else "") + (error.strerror or " ".join(str(error).split()))


def _wrapped(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """The exception's causes, the innermost first, then itself unless it is only Ray's wrapping.

    A RayTaskError carries what the task raised in `cause` and is at the same time a subclass of its type, with a
    traceback as its text; Ray Train carries the workers' exceptions in `worker_failures`, its controller's in
    `controller_failure`, and one that passed through a worker thread in `_base_exc`.
    """
    if id(error) in seen:
        return
    seen.add(id(error))
    inner = [getattr(error, name, None) for name in ("cause", "controller_failure", "_base_exc", "__cause__")]
    inner += list(getattr(error, "worker_failures", {}).values())
    wrapped = [e for e in inner if isinstance(e, BaseException)]
    for exception in wrapped:
        yield from _wrapped(exception, seen)
    if not hasattr(error, "traceback_str"):
        yield error
