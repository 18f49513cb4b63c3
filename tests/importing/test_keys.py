"""How many of each tool's keys are understood, as docs/importing.md says."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from drumline.session.importing import arguments, axolotl, llama_factory, torchtune
from drumline.session.importing.draft import MEANINGLESS, UNKNOWN, UNSUPPORTED, Draft

KEYS = Path(__file__).parent / "keys"
SAMPLES: tuple[Any, ...] = (True, 1, 0.5, "x", ["x"], {"x": 1})


def take(tool: str, draft: Draft, key: str, value: Any) -> None:
    if tool == "axolotl":
        axolotl.take(draft, {"base_model": "a/b", key: value})
    elif tool == "llama-factory":
        llama_factory.take(
            draft, {"finetuning_type": "lora", "stage": "sft", key: value}, Path("none")
        )
    elif tool == "torchtune":
        torchtune.take(draft, {key: value})
    else:
        arguments.take(draft, {key: value}, "sft" if tool == "trl" else "")


def what_becomes_of(tool: str, key: str) -> str:
    """Whether a key alone, with the first value that it can have, is carried over, or why not."""
    for value in SAMPLES:
        draft = Draft()
        try:
            take(tool, draft, key, value)
        except (TypeError, ValueError, AttributeError, KeyError):
            continue  # a value of this type is none for this key
        return next((one.kind for one in draft.left if one.key == key), "carried over")
    raise AssertionError(f"{tool}: {key} takes none of {SAMPLES}")


def shares(tool: str) -> tuple[int, Counter[str]]:
    keys = [line for line in (KEYS / f"{tool}.txt").read_text().splitlines() if line[0] != "#"]
    return len(keys), Counter(what_becomes_of(tool, key) for key in keys)


@pytest.mark.parametrize("tool", ["axolotl", "llama-factory", "trl", "trainer", "torchtune"])
def test_the_docs_say_how_many_keys_are_understood(tool: str) -> None:
    total, found = shares(tool)
    row = f"| {total} | {found['carried over']} | {found[MEANINGLESS]} | {found[UNSUPPORTED]} | {found[UNKNOWN]} |"
    (line,) = [
        one
        for one in (ROOT / "docs/importing.md").read_text().splitlines()
        if f"`{tool}.txt`" in one
    ]
    assert line.endswith(row), row
    assert found[UNKNOWN] < 0.25 * total


def test_a_key_that_nobody_knows_is_told() -> None:
    assert what_becomes_of("axolotl", "no_such_key") == UNKNOWN
