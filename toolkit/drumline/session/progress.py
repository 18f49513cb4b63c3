"""Shows the progress of a run: a bar on a terminal, plain lines otherwise."""

import sys
import time
from typing import Any

from drumline.metrics_file import Kind, parsed_line
from drumline.runs.folder import RunFolder
from drumline.units import format_duration


class Progress:
    """Each call shows the lines that metrics.jsonl has gained; those before the first call are not shown.

    `planned`: samples a second that the plan expects, None where it expects no time.
    """

    def __init__(self, total: int, planned: float | None = None) -> None:
        self._total, self._planned = total, planned
        self._offset: int | None = None
        self._first_step: int | None = None
        self._started = time.monotonic()
        self._evaluation = ""
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = self._make_bar()

    def __call__(self, folder: RunFolder) -> None:
        """Show the new lines of the run's metrics.jsonl."""
        if self._offset is None:  # an earlier command has shown these lines
            self._offset = _size(folder)
        latest = None
        for line in self._new_lines(folder):
            if line["kind"] == Kind.EVENT and "checkpoint/error" in line:
                self.say(f"step {line['step']:,}: not saved: {line['checkpoint/error']}")
            elif line["kind"] == Kind.EVALUATION:
                if latest:
                    self._tell(latest)
                latest = None
                self._evaluation = f"validation {_number(line['eval/loss'], '.4f')}"
                if self._bar is None:
                    print(f"step {line['step']:,}: {self._evaluation}", file=sys.stderr)
            elif line["kind"] == Kind.STEP:
                latest = line
                if line.get("why", "overflow") != "overflow":
                    self.say(_odd_words(line))
        if latest:
            self._tell(latest)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()

    def _new_lines(self, folder: RunFolder) -> list[dict[str, Any]]:
        try:
            with folder.metrics_file.open(encoding="utf-8") as file:
                file.seek(0, 2)
                self._offset = min(self._offset or 0, file.tell())
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole, _, _ = text.rpartition("\n")
        self._offset += len(whole.encode()) + 1 if whole else 0
        return [line for text in whole.split("\n") if (line := parsed_line(text.encode()))]

    def _tell(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if self._first_step is None or step <= self._first_step:
            self._first_step, self._started = step, time.monotonic()
        done = step - self._first_step
        seconds = time.monotonic() - self._started
        left = f"{format_duration((self._total - step) * seconds / done)} left" if done else ""
        loss, lr = _number(line["loss"], ".4f"), _number(line["lr"], ".2e")
        rate = f"{line['samples_per_s']:,.0f} samples/s"
        if self._planned:
            rate += f" ({line['samples_per_s'] / self._planned:.0%} of the planned)"
        if self._bar:
            words = f"loss {loss}  lr {lr}  {rate}  {self._evaluation}"
            self._bar.update(self._bar.task_ids[0], completed=step, words=words, left=left)
        else:
            print(
                f"step {step:,}/{self._total:,}  loss {loss}  lr {lr}  {rate}  {left}".rstrip(),
                file=sys.stderr,
            )

    def say(self, line: str) -> None:
        """Print one message, such as why the run restarts."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr)

    def _make_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        bar = RichProgress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}  {task.fields[left]}"),
            console=Console(stderr=True),
        )
        bar.add_task("", total=self._total, words="starting", left="")
        bar.start()
        return bar


def _size(folder: RunFolder) -> int:
    try:
        return folder.metrics_file.stat().st_size
    except OSError:
        return 0


def _odd_words(line: dict[str, Any]) -> str:
    """Describe an anomalous step: the reason, its ranks, and whether it was skipped or applied."""
    ranks = line.get("ranks")
    where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
    beyond = f" of {line['sigma']:.1f} sigma" if line.get("sigma") else ""
    done = "skipped" if line["skipped"] else "applied"
    return f"step {line['step']:,}: {line['why']}{beyond}{where}; {done}"


def _number(value: float | None, style: str) -> str:
    return "not finite" if value is None else format(value, style)
