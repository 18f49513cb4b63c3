"""Commands of drumline in a process of their own: they own signals and launchers, which a notebook cannot."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection
from typing import Any

from drumline.errors import DoesNotFit, DrumlineError, RunError

_ERRORS: dict[int, type[DrumlineError]] = {3: DoesNotFit, 4: RunError}


def run_command(words: list[str], accepted: Collection[int], is_quiet: bool) -> dict[str, Any]:
    """Run `drumline WORDS --json` and return what it prints on stdout.

    Its messages go to stderr as they come, unless `is_quiet`. An interrupt stops it at a checkpoint, as
    Ctrl-C does. DrumlineError with its message if it ends with another exit code than 0 and those `accepted`.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "drumline.cli", *words, "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONUTF8": "1"},
        start_new_session=True,
    )
    told: list[str] = []
    interrupted = False

    def follow() -> None:
        assert process.stderr
        for line in process.stderr:
            told.append(line)
            if not is_quiet:
                print(line, end="", file=sys.stderr)

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    assert process.stdout
    try:
        shown = process.stdout.read()
        code = process.wait()
    except KeyboardInterrupt:
        interrupted = True
        process.send_signal(signal.SIGINT)
        shown = process.stdout.read()
        code = process.wait()
    reader.join()
    if code and code not in accepted:
        raise _ERRORS.get(code, DrumlineError)(_message(told, code))
    if shown.strip():
        return json.loads(shown)  # type: ignore[no-any-return]
    if interrupted:  # before there was anything to report
        raise KeyboardInterrupt
    raise RunError(_message(told, code))


def _message(told: list[str], code: int) -> str:
    """What the command said last, from where its error begins."""
    starts = [place for place, line in enumerate(told) if line.startswith("drumline: ")]
    text = "".join(told[starts[-1] :]).removeprefix("drumline: ") if starts else "".join(told[-5:])
    return text.strip() or f"drumline ended with exit code {code}"
