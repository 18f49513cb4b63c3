"""metrics.jsonl after a resume: each step once, nothing torn, and no more read than the end."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drumline import metrics_file
from drumline.metrics_file import Kind, MetricsFile, cut_after, read_metrics, with_kind


def step_line(step: int) -> dict[str, Any]:
    return {"kind": "step", "step": step, "loss": 1.0 / step, "lr": 0.1}


def lines_of(steps: int, eval_every: int, save_every: int, lag: int) -> list[dict[str, Any]]:
    """As a run writes them: a save's event comes `lag` steps after its step."""
    lines = []
    for step in range(1, steps + 1):
        lines.append(step_line(step))
        if step % eval_every == 0:
            lines.append({"kind": "evaluation", "step": step, "eval/loss": 0.5})
        if step > lag and (step - lag) % save_every == 0:
            lines.append({"kind": "event", "step": step - lag, "checkpoint/saved": 1.0})
    return lines


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 40),
    resume_at=st.integers(0, 45),
    eval_every=st.integers(1, 7),
    save_every=st.integers(1, 7),
    lag=st.integers(0, 5),
    due=st.booleans(),
    torn=st.integers(0, 30),
    old=st.booleans(),
)
def test_what_lies_after_the_checkpoint_goes(
    tmp_path_factory: Any, steps: int, resume_at: int, eval_every: int, save_every: int, lag: int,
    due: bool, torn: int, old: bool,
) -> None:  # fmt: skip
    """Lines of later steps go wherever they stand, events of earlier ones stay, also in older files."""
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    lines = lines_of(steps, eval_every, save_every, lag)
    written = [{k: v for k, v in line.items() if k != "kind"} if old else line for line in lines]
    raw = "".join(json.dumps(line) + "\n" for line in written).encode()
    path.write_bytes(raw + json.dumps(step_line(steps + 1)).encode()[:torn])
    cut_after(path, resume_at, due)
    expected = [
        line
        for line in lines
        if line["step"] <= resume_at
        and not (due and line["step"] == resume_at and line["kind"] == "evaluation")
    ]
    assert read_metrics(path) == expected
    assert path.read_bytes().endswith(b"\n") or not expected


def test_only_the_end_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume near the end of a long file reads a few blocks of it, and keeps its first bytes in place."""
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(step_line(step)) + "\n" for step in range(1, 200_001))
    size, inode = path.stat().st_size, path.stat().st_ino
    parsed = []
    real = metrics_file.parsed_line
    monkeypatch.setattr(metrics_file, "parsed_line", lambda raw: parsed.append(1) or real(raw))
    MetricsFile(path, resume_at=199_990).close()
    assert len(parsed) < 5_000
    assert path.stat().st_ino == inode
    assert size - 2_000 < path.stat().st_size < size


def test_a_kill_between_writing_and_shortening_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left then is cut again by the next start, to the same lines."""
    path = tmp_path / "metrics.jsonl"
    lines = lines_of(20, 3, 4, 3)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = path.read_bytes()
    cut_after(path, 11, True)
    expected = path.read_bytes()
    path.write_bytes(whole)

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            cut_after(path, 11, True)
    assert path.read_bytes() != expected
    cut_after(path, 11, True)
    assert path.read_bytes() == expected


def test_kinds_of_older_lines() -> None:
    """Before lines had a kind, their fields told."""
    assert with_kind({"step": 1, "lr": 0.1})["kind"] is Kind.STEP
    assert with_kind({"step": 1, "eval/loss": 0.1})["kind"] is Kind.EVALUATION
    assert with_kind({"step": 1, "checkpoint/saved": 0.1})["kind"] is Kind.EVENT
    assert with_kind({"step": 1, "kind": "event", "lr": 0.1})["kind"] == "event"
