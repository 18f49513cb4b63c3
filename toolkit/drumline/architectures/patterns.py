"""Names of a model's parts, chosen by patterns; a pattern that matches nothing is refused. Pure."""

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from drumline.errors import PlanError

_SHOWN = 3


def matching(patterns: Iterable[str], names: Collection[str], key: str) -> set[str]:
    """The names that any of the patterns matches, with `*` for any letters.

    PlanError names the recipe's `key`, the first pattern without a match, and names that are like it.
    """
    found: set[str] = set()
    for pattern in patterns:
        these = {name for name in names if fnmatchcase(name, pattern)}
        if not these:
            raise PlanError(
                f"{key}: {pattern!r} matches no parameter. {near_misses(pattern, names)}"
            )
        found |= these
    return found


def ending_with(targets: Iterable[str], names: Collection[str], key: str) -> set[str]:
    """The names whose last parts are any of the targets: `q_proj` is `layers.0.self_attn.q_proj`.

    PlanError as in `matching`.
    """
    found: set[str] = set()
    for target in targets:
        these = {name for name in names if f".{name}".endswith(f".{target}")}
        if not these:
            ends = {name.rpartition(".")[2] for name in names}
            raise PlanError(f"{key}: no layer is called {target!r}. {near_misses(target, ends)}")
        found |= these
    return found


def near_misses(text: str, names: Collection[str]) -> str:
    """Advice: the names that are most like this text."""
    close = difflib.get_close_matches(text, sorted(names), n=_SHOWN, cutoff=0.3)
    return f"Nearest: {', '.join(close or sorted(names)[:_SHOWN]) or 'none'}"


def covering(chosen: Collection[str], names: Collection[str]) -> list[str]:
    """Few patterns that match exactly these of the names: `a.b.*` where all of a.b is chosen."""
    found = set()
    for name in chosen:
        parts = name.split(".")
        prefixes = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
        whole = (
            prefix
            for prefix in prefixes
            if all(other in chosen for other in names if other.startswith(prefix))
        )
        prefix = next(whole, None)
        found.add(f"{prefix}*" if prefix else name)
    return sorted(found)
