"""The project's exceptions: each carries one line that a user can act on."""


class BltError(Exception):
    """Base of every error that a user can mend; its message is one line without a traceback's help."""


class ConfigError(BltError, ValueError):
    """A configuration key or argument is unknown, missing or out of range; the message names it."""


class DataError(BltError, ValueError):
    """Input data is missing, empty, broken or does not match; the message names the file or URI."""


class StorageError(DataError):
    """Storage does not answer or fails now; it may work again later. The message names the file or URI."""


class CheckpointError(BltError, ValueError):
    """A checkpoint is missing, broken or made for something else; the message names the file."""


class TrainingError(BltError):
    """A training step failed in a way that a repetition does not mend; the message names the step."""


class CheckpointStorageError(CheckpointError, StorageError):
    """A checkpoint cannot be read or written because storage fails now."""


class ClusterError(BltError):
    """A cluster's job server does not answer or refuses, or a job on it has failed; the message names the job."""
