"""Every error a user can meet, one tree.

SdxlFlowsError              base: prints as one paragraph, no traceback, exit status 1
├── ConfigError             what was asked for cannot be right (exit status 2): the user changes a value
├── DataError               an input or output file is not what it must be
│   ├── ShardError          a shard's own files
│   └── CheckpointError     model weights or training state
├── LockedError             another process works on this output
├── CrashLoopError          a run's process has died again and again
├── DiskFullError           no room left; everything finished is kept
├── TrainingError           the trainer stopped
└── TransientError          may go away by itself: the only kind a task retries
"""


class SdxlFlowsError(Exception):
    """Base of all errors that are the user's to read. `str(error)` says what, where and what to do next."""

    exit_status = 1


class ConfigError(SdxlFlowsError):
    """A parameter, path or combination that cannot be right. Never retried."""

    exit_status = 2


class DataError(SdxlFlowsError):
    """A file that is missing, torn or of another kind than it must be. Never retried."""


class ShardError(DataError):
    """A shard's ledger or latents contradict each other."""


class CheckpointError(DataError):
    """Model weights or a training state that cannot be used."""


class LockedError(SdxlFlowsError):
    """Another live process holds this output folder. `run`: what that process said it belongs to, "" if nothing."""

    def __init__(self, text: str, run: str = "") -> None:
        super().__init__(text)
        self.run = run


class CrashLoopError(SdxlFlowsError):
    """A run has been started too often, and never came to an end."""


class DiskFullError(SdxlFlowsError):
    """The disk is full. What was finished before is on disk and is not redone."""


class TrainingError(SdxlFlowsError):
    """The trainer process ended before its work was done."""


class TransientError(SdxlFlowsError):
    """A failure that a second attempt may not meet (a killed worker, a network file system). Retried by tasks."""
