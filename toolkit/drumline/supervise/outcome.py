"""How an attempt ended, read from the ranks' outcome files; the launcher's exit code is ignored."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from drumline.errors import RunError
from drumline.supervise.ranks import Ranks

STOPPED_EXIT_CODE = 75
LOG_ENDS = ", whose launcher.log ends:"
KILLED_EXIT_CODE = 130
"""Ended by a second Ctrl-C: no new checkpoint is saved, older ones are kept, and there is no restart."""

Kind = Literal["finished", "stopped", "killed", "mistake", "disk", "OutOfMemory", "NotFinite",
               "NotFiniteAfterLoad", "CheckpointError", "hang", "lost", "error"]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How an attempt or a run ended; `exit_code` is 0, 4, 75 or 130, or the code of a user's mistake.

    `kind` decides what the supervisor does next; `step` is the last finished step; `suspect` names the
    checkpoint after whose load every step was non-finite.
    """

    kind: Kind
    outcome: str
    step: int
    loss: float | None
    evaluation: dict[str, float] | None
    message: str
    exit_code: int
    suspect: str = ""

    @classmethod
    def failure(cls, kind: Kind, step: int, message: str, exit_code: int = 4) -> Self:
        """Build the result of a failed attempt."""
        return cls(
            kind=kind,
            outcome="failed",
            step=step,
            loss=None,
            evaluation=None,
            message=message,
            exit_code=exit_code,
        )

    @classmethod
    def stopped_early(cls, message: str) -> Self:
        """Build the result of an attempt that a signal ended before it had anything to save."""
        return cls(
            kind="stopped",
            outcome="stopped",
            step=0,
            loss=None,
            evaluation=None,
            message=message,
            exit_code=STOPPED_EXIT_CODE,
        )

    def saying(self, message: str) -> "Result":
        """Return a copy with another message."""
        return replace(self, message=message)


AGREED = {"NotFinite", "NotFiniteAfterLoad", "CheckpointError"}
"""Kinds of error that every rank raises in the same step."""


def judge(ranks: Ranks, logs: Path, at_once: bool, died: list[int]) -> Result:
    """Derive the attempt's result from the outcome files.

    The earliest error that is not PeerLost is the cause: PeerLost is only its effect on other ranks.
    `at_once`: a second Ctrl-C has ended the ranks. `died`: ranks that exited without an outcome file before
    the supervisor ended the others.
    """
    ranks.refresh()
    step = ranks.steps_done
    outcomes = [(view.rank, view.files.outcome()) for view in ranks]
    failed = sorted(
        ((rank, o) for rank, o in outcomes if o and o["outcome"] == "failed"),
        key=lambda pair: pair[1]["when"],
    )
    own = [(rank, o) for rank, o in failed if o["kind"] != "PeerLost"]
    missing = [rank for rank, outcome in outcomes if outcome is None]
    if not at_once and (own or (failed and not missing)):
        rank, first = (own or failed)[0]
        return _failed_rank(rank, first, step)
    if missing or failed:
        named = ", ".join(map(str, died or missing))
        if at_once:
            message = "ended at once, without a new checkpoint"
            return Result.failure("killed", step, message, KILLED_EXIT_CODE)
        message = f"rank {named} ended without a word; see {logs}{LOG_ENDS}{last_words(logs)}"
        return Result.failure("lost", step, message)
    told = outcomes[0][1]
    assert told
    stopped = told["outcome"] == "stopped"
    return Result(
        kind="stopped" if stopped else "finished",
        outcome=told["outcome"],
        step=told["step"],
        loss=told["loss"],
        evaluation=told["evaluation"],
        message=told["reason"],
        exit_code=STOPPED_EXIT_CODE if stopped else 0,
    )


def _failed_rank(rank: int, outcome: dict[str, Any], step: int) -> Result:
    kind, message = outcome["kind"], outcome["message"]
    if outcome["exit_code"] != RunError.exit_code:
        return Result.failure("mistake", step, message, outcome["exit_code"])
    if kind in AGREED:
        return replace(Result.failure(kind, step, message), suspect=outcome["suspect"])
    message = f"rank {rank}: {outcome['error']}: {message}"
    return Result.failure("OutOfMemory" if kind == "OutOfMemory" else "error", step, message)


def last_words(logs: Path) -> str:
    """Last five lines of the launcher's log, where an import error would show."""
    try:
        text = (
            (logs / "launcher.log")
            .read_text(encoding="utf-8", errors="replace")
            .strip()
            .splitlines()
        )
    except OSError:
        return ""
    return "\n" + "\n".join(text[-5:]) if text else " without a line"
