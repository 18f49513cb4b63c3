"""Every mistake a user can make, as a tree; the exit code belongs to the class.

    DrumlineError
    ├── RecipeError        2   the YAML, a key, a value, an override
    ├── PlanError          2   the batch equation, the steps, the strategy table
    │   └── DoesNotFit     3   the plan is sound but its peak memory exceeds the GPU
    ├── DataError          2   a file that is missing, empty or not what it says
    ├── LaunchError        2   this machine cannot start what the plan asks for
    ├── CheckpointError    4   no sound checkpoint, or one of another training
    ├── RunFolderError     2   the folder named is not a run, or is one already
    └── RunError           4   the run failed
        ├── NotFinite          too many steps in a row were skipped; a restart would repeat them
        ├── NotFiniteAfterLoad all steps after a load were; the checkpoint before is tried
        └── PeerLost           another rank is gone; the cause is there

Exit code 75 is no error: the run stopped on a signal with a checkpoint saved; resume goes on.

A message gives path, value, arithmetic and the nearest legal fix. A mistake of ours is an
`assert` or a plain exception and keeps its traceback.
"""

NOT_EQUAL_EXIT_CODE = 5
"""What was to be equal is not: `verify`, `reproduce`. No error either: the command did its work."""


class DrumlineError(Exception):
    """Base of every error that is the user's to mend; `exit_code` is what the command returns."""

    exit_code = 2


class RecipeError(DrumlineError):
    """The recipe's text or one of its values is wrong."""


class PlanError(DrumlineError):
    """The recipe is well-formed but no plan can be made of it."""


class DoesNotFit(PlanError):
    """The estimated peak memory of a rank exceeds the device."""

    exit_code = 3


class DataError(DrumlineError):
    """The data are missing, empty, or not what the recipe says."""


class LaunchError(DrumlineError):
    """The processes that the plan names cannot be started here."""


class CheckpointError(DrumlineError):
    """A checkpoint is missing, damaged, or belongs to another training."""

    exit_code = 4


class RunError(DrumlineError):
    """The run started and failed."""

    exit_code = 4


class NotFinite(RunError):
    """Loss or gradient stayed non-finite."""


class NotFiniteAfterLoad(RunError):
    """Loss or gradient was non-finite from the first step after `checkpoint` was loaded."""

    def __init__(self, message: str, checkpoint: str) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class PeerLost(RunError):
    """Another rank, or the store that the ranks share, is gone."""


class RunFolderError(DrumlineError):
    """The folder named is not a run folder, or already holds something."""
