"""Reads the files of other tools: YAML, JSON, and the flags of a command in a script; nothing is executed."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drumline.errors import RecipeError
from drumline.recipe import yaml12

_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)$")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)")
_LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "python", "python3", "llamafactory-cli", "axolotl",
              "tune", "trl")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A file, and what it holds: keys and values; of a script, those of its command in `command`."""

    name: str
    keys: dict[str, Any]
    command: "Command | None" = None


@dataclass(frozen=True)
class Command:
    """A launch command: its words before the program, the flags of the launcher, and of the program."""

    launcher: str
    launcher_flags: dict[str, Any]
    program: str
    flags: dict[str, Any]
    environment: dict[str, str]
    files: tuple[str, ...] = ()


def read(path: Path) -> Source:
    """What a file holds; RecipeError where it is neither YAML, JSON nor a script with a launch command."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from None
    if path.suffix in (".sh", ".bash", ".slurm", ".sbatch", ".txt", ""):
        return Source(path.name, {}, _command_of(text, str(path)))
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"{path}: {error}") from None
    else:
        found = yaml12.parse(text)
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: {type(found).__name__}, and not keys with values")
    return Source(path.name, {str(key): value for key, value in found.items()})


def _command_of(text: str, where: str) -> Command:
    """The last command of a script that starts a training."""
    environment: dict[str, str] = {}
    found: Command | None = None
    joined = re.sub(r"\\\s*\n", " ", text)
    for line in joined.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        assigned = _ASSIGNMENT.match(line)
        if assigned and not re.search(rf"\s({'|'.join(_LAUNCHERS)})\s", line):
            environment[assigned[1]] = _filled(assigned[2], environment).strip().strip("\"'")
            continue
        try:
            words = shlex.split(_filled(line, environment), comments=True)
        except ValueError:
            continue
        while words and (own := _ASSIGNMENT.match(words[0])):
            environment[own[1]] = own[2]
            words = words[1:]
        while words and words[0] in ("srun", "nohup", "exec", "time", "sudo", "uv", "run", "env"):
            words = words[1:]
        if words and Path(words[0]).name in _LAUNCHERS and len(words) > 1:
            found = _parsed(words, environment)
    if found is None:
        raise RecipeError(
            f"{where}: no command that starts a training was found ({', '.join(_LAUNCHERS)}). Nearest: a "
            "script with such a command"
        )
    return found


def _filled(text: str, environment: dict[str, str]) -> str:
    """The text with those of its variables that the script sets."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return environment.get(name, match[2] if match[2] is not None else match[0])

    return _VARIABLE.sub(value, text)


def _parsed(words: list[str], environment: dict[str, str]) -> Command:
    launcher, rest = Path(words[0]).name, words[1:]
    if launcher == "accelerate" and rest[:1] == ["launch"]:
        rest = rest[1:]
    if launcher.startswith("python") and rest[:2] == ["-m", "torch.distributed.run"]:
        launcher, rest = "torchrun", rest[2:]
    if launcher.startswith("python") and rest[:2] == ["-m", "torch.distributed.launch"]:
        launcher, rest = "torchrun", rest[2:]
    own: dict[str, Any] = {}
    while rest and rest[0].startswith("-"):
        if rest[0] in ("-m", "--module"):
            break
        name, value, used = _flag(rest, is_launcher=True)
        own[name] = value
        rest = rest[used:]
    if rest[:1] in (["-m"], ["--module"]):
        rest = rest[1:]
    program, rest = (rest[0], rest[1:]) if rest else ("", [])
    if launcher in ("trl", "llamafactory-cli", "axolotl", "tune"):
        program = f"{launcher} {program}"
    flags: dict[str, Any] = {}
    files: list[str] = []
    while rest:
        if not rest[0].startswith("--"):
            if Path(rest[0]).suffix in (".yaml", ".yml", ".json"):
                files.append(rest[0])
            rest = rest[1:]
            continue
        name, value, used = _flag(rest)
        flags[name] = value
        rest = rest[used:]
    return Command(launcher, own, program, flags, dict(environment), tuple(files))


def _flag(words: list[str], is_launcher: bool = False) -> tuple[str, Any, int]:
    """A flag's name with underscores, its value, and how many words both are."""
    name, equals, value = words[0].lstrip("-").partition("=")
    name = name.replace("-", "_")
    if equals:
        return name, _scalar(value), 1
    values = []
    for word in words[1:]:
        if word.startswith("--") or (word.startswith("-") and not _is_number(word)):
            break
        values.append(word)
        if is_launcher:
            break
    if (
        is_launcher and values and values[0].endswith(".py")
    ):  # a flag without a value, and the program
        return name, True, 1
    if not values:
        return name, True, 1
    return (
        name,
        _scalar(values[0]) if len(values) == 1 else [_scalar(v) for v in values],
        1 + len(values),
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _scalar(text: str) -> Any:
    """A word as YAML would read it: True, a number, null, or itself."""
    try:
        found = yaml12.parse(f"x: {text}")["x"]
    except (RecipeError, KeyError, TypeError):
        return text
    return found if isinstance(found, bool | int | float | str) or found is None else text
