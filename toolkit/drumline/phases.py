"""Where a rank is, as an enum: the loop says it, the watchdogs and the memory trace read it."""

from enum import StrEnum


class Phase(StrEnum):
    """What a rank is doing. All ranks pass the same phases in the same order."""

    STARTING = "start"
    IMPORTING = "imports"
    JOINING = "joining the other ranks"
    BUILDING = "building the model"
    LOADING = "load"
    WARMING_UP = "warm-up"
    MEASURING = "log-probabilities of the reference"
    STEP_BEGINS = "begin"
    FORWARD = "forward"
    BACKWARD = "backward"
    REDUCING = "step reduce"
    UPDATING = "update"
    EVALUATING = "evaluation"
    SAVING = "save"
    REFERENCE = "reference"
    ENDED = "ended"

    @property
    def is_before_the_first_step(self) -> bool:
        """Imports, the model, a large checkpoint, a compilation: these take minutes."""
        return self in _BEFORE_THE_FIRST_STEP

    @property
    def is_before_loading(self) -> bool:
        """Nothing has been read from a checkpoint, so there is nothing to save yet."""
        return self in _BEFORE_LOADING

    @property
    def start_limit_s(self) -> float:
        """The longest that a phase before the first step may take, unless `hang_timeout_s` is longer."""
        return _START_LIMITS_S.get(self, 0.0)

    @property
    def is_in_a_step(self) -> bool:
        """Forward, backward, reduce, update: what a step's median time is made of."""
        return self in _IN_A_STEP


_BEFORE_THE_FIRST_STEP = frozenset({
    Phase.STARTING, Phase.IMPORTING, Phase.JOINING, Phase.BUILDING, Phase.LOADING, Phase.WARMING_UP,
    Phase.MEASURING,
})  # fmt: skip
_BEFORE_LOADING = frozenset({Phase.STARTING, Phase.IMPORTING, Phase.JOINING, Phase.BUILDING})
_START_LIMITS_S = {
    Phase.STARTING: 180.0,
    Phase.IMPORTING: 600.0,
    Phase.JOINING: 600.0,
    Phase.BUILDING: 600.0,
    Phase.LOADING: 600.0,
    Phase.WARMING_UP: 1800.0,
}
"""Starting: the launcher and Python. Joining waits for the slowest import, warm-up for a compilation."""
_IN_A_STEP = frozenset({
    Phase.STEP_BEGINS, Phase.FORWARD, Phase.BACKWARD, Phase.REDUCING, Phase.UPDATING,
})  # fmt: skip


class MemoryPhase(StrEnum):
    """The phases that the memory estimate tells apart, in the plan's own words (`memory.peak_phase`)."""

    LOAD = "load"
    FORWARD = "forward + loss"
    BACKWARD = "backward"
    OPTIMIZER_STEP = "optimizer step"
    EVALUATION = "evaluation"
    SAVE = "save"
