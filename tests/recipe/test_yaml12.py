"""YAML 1.2 scalars, and a dumper that the loader reads back."""

import math
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from drumline.errors import RecipeError
from drumline.recipe import yaml12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3.0e-4", 3e-4),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-11-22", "2026-11-22"),
        ("~", None),
        ("", None),
        ("true", True),
        ("-.inf", -math.inf),
        ("'1e-3'", "1e-3"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    """`1e-3` is a float and `no` a string, as YAML 1.2's core schema says."""
    found = yaml12.parse(text)
    assert found == value
    assert type(found) is type(value)


def test_duplicate_keys_are_refused_with_their_line() -> None:
    """The second of two equal keys is an error, not a silent winner."""
    with pytest.raises(RecipeError, match=r"line 3: key 'lr' stands twice"):
        yaml12.parse("lr: 1\nb: 2\nlr: 3\n")


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\t- x", "a: *missing", "!!python/object:os.system x"]
)
def test_broken_or_unsafe_yaml_is_one_clear_error(text: str) -> None:
    """Syntax errors, unknown anchors and tags never reach Python objects."""
    with pytest.raises(RecipeError, match="not valid YAML"):
        yaml12.parse(text)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
@example({"a": "\x85", "b": "x\u2028y", "c": "é × σ"})
@given(st.dictionaries(st.text(min_size=1), scalars | st.lists(scalars, max_size=4), max_size=5))
def test_what_is_dumped_is_read_back(value: dict[str, object]) -> None:
    """A recipe written to a run folder has the same values when it is read again."""
    assert yaml12.parse(yaml12.dump(value)) == value


TEN_LEVELS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40)
)
BOMBS = {
    "aliases": (TEN_LEVELS, "with every alias written out"),
    "an alias of itself": ("&a [*a]", "unknown, or part of itself"),
    "flow sequences": ("[" * 30_000 + "]" * 30_000, "nested more than 50 levels deep"),
    "flow mappings": ("{a: " * 100_000, "nested more than 50 levels deep"),
    "block sequences": ("- " * 30_000 + "x", "nested more than 50 levels deep"),
    "size": ("x" * (yaml12.LARGEST + 1), "at most 1,048,576"),
    "a merge key": ("base: &b {a: 1}\nx:\n  <<: *b\n", r"line 3: merge keys \(<<\) are not part of YAML 1.2"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_before_they_are_composed(bomb: str) -> None:
    """Aliases that explode, any kind of nesting, size: one message, at once, without a crash."""
    text, words = BOMBS[bomb]
    started = time.process_time()
    with pytest.raises(RecipeError, match=words):
        yaml12.parse(text)
    assert time.process_time() - started < 1


def test_aliases_that_do_not_explode_are_read() -> None:
    """Fifty levels and a few aliases are ordinary YAML."""
    assert yaml12.parse("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert yaml12.parse("[" * 50 + "]" * 50)
