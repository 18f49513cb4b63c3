"""The tree of errors that a user can fix; each class has an exit code.

    DrumlineError
    ├── RecipeError        2   the YAML, a key, a value, an override
    ├── PlanError          2   the batch equation, the steps, the strategy table
    │   ├── NotPrepared        the steps are known only once the data are prepared
    │   └── DoesNotFit     3   the plan is sound but its peak memory exceeds the GPU
    ├── DataError          2   a file that is missing, empty or not in its stated format
    │   └── OfAllRows          what is wrong with every row of a source, which skipping bad rows would hide
    ├── LaunchError        2   this machine cannot start what the plan asks for
    ├── CheckpointError    4   no sound checkpoint, or one of another training
    │   └── CheckpointUnreadable   its files cannot be read now, which says nothing about their content
    ├── RunFolderError     2   the folder is not a run folder, or already holds a run
    └── RunError           4   the run failed
        ├── NotFinite          too many steps in a row were skipped; a restart would repeat them
        ├── NotFiniteAfterLoad the first steps after a load were all non-finite; an older checkpoint is tried
        └── PeerLost           another rank is gone; its outcome has the cause

Exit code 75 is not an error: the run stopped on a signal with a checkpoint saved, and can be resumed.

A message gives path, value, arithmetic and the nearest legal fix. A bug in drumline is an `assert` or a
plain exception and keeps its traceback.
"""

NOT_EQUAL_EXIT_CODE = 5
"""`verify` and `reproduce` found a difference. Not an error: the command itself succeeded."""


class DrumlineError(Exception):
    """Base of every error that the user can fix; `exit_code` is the command's exit code."""

    exit_code = 2


class RecipeError(DrumlineError):
    """The recipe's text or one of its values is wrong."""


class PlanError(DrumlineError):
    """The recipe is well-formed but has no valid plan."""


class NotPrepared(PlanError):
    """How many steps there are follows from the number of samples, which is not known yet."""


class DoesNotFit(PlanError):
    """The estimated peak memory of a rank exceeds the device."""

    exit_code = 3


class DataError(DrumlineError):
    """The data are missing, empty, or not what the recipe says."""


class OfAllRows(DataError):
    """Every row of a source is wrong in the same way, such as by another tokenizer; none may be skipped."""


class LaunchError(DrumlineError):
    """This machine cannot start the processes that the plan needs."""


class CheckpointError(DrumlineError):
    """A checkpoint is missing, damaged, or belongs to another training."""

    exit_code = 4


class CheckpointUnreadable(CheckpointError):
    """A checkpoint cannot be read now (permission, I/O error, mount gone); it may well be sound."""


class RunError(DrumlineError):
    """The run started and failed."""

    exit_code = 4


class NotFinite(RunError):
    """`anomalies.max_skipped` steps in a row were skipped as non-finite or, if configured, as spikes."""


class NotFiniteAfterLoad(RunError):
    """Loss or gradient was non-finite in each of the first steps after `checkpoint` was loaded."""

    def __init__(self, message: str, checkpoint: str) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class PeerLost(RunError):
    """Another rank, or the key-value store that the ranks share, is gone."""


class RunFolderError(DrumlineError):
    """The folder is not a run folder, or is not empty where a new one is needed."""
