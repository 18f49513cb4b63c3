"""A recipe that is being made of other tools' files, with what could not be carried over."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from drumline.recipe import yaml12
from drumline.recipe.other_names import NotOffered, keys_for

MEANINGLESS, UNSUPPORTED, UNKNOWN = "no meaning here", "not supported", "not known"


@cache
def why_not(tool: str) -> tuple[dict[str, str], dict[str, str]]:
    """Why keys of a tool are not carried over: those without a meaning here, and those not supported."""
    text = (Path(__file__).parent / "not_carried.yaml").read_text(encoding="utf-8")
    tables = yaml12.parse(text)
    meaningless: dict[str, str] = {}
    unsupported: dict[str, str] = {}
    for name in dict.fromkeys(("arguments", tool)):
        for reason, keys in tables[name]["meaningless"].items():
            meaningless |= dict.fromkeys(keys, reason)
        unsupported |= tables[name]["unsupported"]
    return meaningless, unsupported


@dataclass(frozen=True)
class Left:
    """A key of a file that the recipe does not have, and why."""

    file: str
    key: str
    value: Any
    kind: str
    why: str


@dataclass
class Draft:
    """Values by the dotted keys of a recipe, and a comment for each choice that was made.

    `left`: keys that were not carried over. `differences`: where the results will not be those of the other
    tool. `taken`: how many keys of the files were understood. `file`: the one being read.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    taken: int = 0
    file: str = ""

    def set(self, key: str, value: Any, comment: str = "", weakly: bool = False) -> None:
        """Set a key of the recipe; `weakly`: unless it has a value already."""
        if weakly and key in self.keys:
            return
        self.keys[key] = value
        if comment:
            self.comments[key] = comment

    def leave(self, key: str, value: Any, kind: str, why: str) -> None:
        """Note a key that is not carried over."""
        self.left.append(Left(self.file, key, value, kind, why))

    def differ(self, text: str) -> None:
        """Note where results will differ, once."""
        if text not in self.differences:
            self.differences.append(text)

    def take(self, name: str, value: Any, weakly: bool = False) -> bool:
        """Carry over a key that several tools share; whether its name is known."""
        try:
            found = keys_for(name, value)
        except NotOffered as error:
            self.leave(name, value, UNSUPPORTED, str(error))
            return True
        except (TypeError, ValueError) as error:
            self.leave(name, value, UNSUPPORTED, f"its value cannot be read: {error}")
            return True
        if found is None:
            return False
        for key, one in found.items():
            self.set(key, one, weakly=weakly)
        self.taken += 1
        return True

    def take_all(self, given: Mapping[str, Any], tool: str) -> None:
        """Carry over what is left of a file's keys after those that only its tool has.

        Unset ones and those that are off are passed over; not_carried.yaml says why a key has no place here.
        """
        meaningless, unsupported = why_not(tool)

        def why(table: dict[str, str], name: str) -> str | None:
            return table.get(name) or next(
                (reason for key, reason in table.items() if "*" in key and fnmatchcase(name, key)),
                None,
            )

        for name, value in given.items():
            if value is None or value == "" or value in ("auto", [], {}):
                continue
            reason, idle = why(unsupported, name), why(meaningless, name)
            if (reason or idle) and (value is False or (reason and value == 0)):
                self.taken += 1
            elif reason:
                self.leave(name, value, UNSUPPORTED, reason)
            elif idle:
                self.leave(name, value, MEANINGLESS, idle)
            elif not self.take(name, value):
                self.leave(name, value, UNKNOWN, "no key of this name is known")
