"""A run as it was logged, wherever its record lies: a run folder, a recipe.yaml, a checkpoint, W&B."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.checkpoint.manifest import MANIFEST, read_manifest, verify
from toolkit.checkpoint.weights import weight_facts
from toolkit.errors import RecipeError, RunFolderError
from toolkit.metrics_file import read_metrics
from toolkit.recipe import yaml12
from toolkit.runs.environment import THAT_TRAIN
from toolkit.runs.folder import RunFolder

_COMMENT = "#| "
_HEAD = "# What came out of this recipe, one fact a line, for `drumline reproduce`:"
_FACTS = (
    "recipe_sha256",
    "training_sha256",
    "data",
    "model",
    "code",
    "versions",
    "drumline_sha256",
    "hardware",
    "container",
    "created",
    "weights",
)
_STEP_FACTS = ("step", "digest", "lr", "loss", "grad_norm", "weight")
_MOST_STEPS = 64


@dataclass(frozen=True)
class Logged:
    """What is known of a run: its record (or a part of it) and its step lines, each step once.

    `events` are lines beside the steps: saves, and saves that failed.
    `until`: compare up to this step only, where a checkpoint was named.
    """

    name: str
    record: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    until: int | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, plain."""
        return self.record["recipe"]  # type: ignore[no-any-return]

    @property
    def last_step(self) -> int | None:
        """The last step that is known; None where none is."""
        if self.until is not None:
            return self.until
        weights = self.record.get("weights")
        known = [self.steps[-1]["step"]] if self.steps else []
        return max(known + ([weights["step"]] if weights else []), default=None)


def read_logged(where: str) -> Logged:
    """What `drumline reproduce`, `compare` and `report` are given; RunFolderError for anything else."""
    if where.startswith("wandb:"):
        from toolkit.runs.wandb_runs import read_online

        return read_online(where)
    path = Path(where)
    if not path.exists():
        raise RunFolderError(f"{where}: does not exist")
    if (path / "record.json").is_file():
        return read_folder(RunFolder(path.resolve()))
    if (path / MANIFEST).is_file():
        return _read_checkpoint(path.resolve())
    if path.suffix == ".wandb" or (path.is_dir() and any(path.rglob("run-*.wandb"))):
        from toolkit.runs.wandb_runs import read_offline

        return read_offline(path)
    if path.is_file():
        if path.name == "recipe.yaml" and (path.parent / "record.json").is_file():
            return read_folder(RunFolder(path.resolve().parent))
        return _read_recipe_file(path)
    raise RunFolderError(
        f"{where}: neither a run folder (record.json), a checkpoint ({MANIFEST}), a logged recipe.yaml nor a "
        ".wandb file"
    )


def read_folder(folder: RunFolder, until: int | None = None) -> Logged:
    """A run folder's record and metrics."""
    lines = split_lines(read_metrics(folder.metrics_file))
    return Logged(str(folder.path), folder.read_record(), *lines, until)


Lines = list[dict[str, Any]]


def split_lines(lines: Lines) -> tuple[Lines, Lines, Lines]:
    """Step lines, evaluations, events; of a step that stands there twice, the later one."""
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    events = []
    for line in lines:
        if "lr" in line:
            steps[line["step"]] = line
        elif "eval/loss" in line:
            evaluations[line["step"]] = line
        else:
            events.append(line)
    return [steps[n] for n in sorted(steps)], [evaluations[n] for n in sorted(evaluations)], events


def facts_comment(record: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """What a finished run adds to its recipe.yaml, so that this file alone can be reproduced and checked."""
    facts = {name: record.get(name) for name in _FACTS}
    versions = record.get("versions") or {}
    facts["versions"] = {name: versions.get(name) for name in THAT_TRAIN}
    code = {name: value for name, value in (record.get("code") or {}).items() if name != "left_out"}
    facts["code"] = {**code, "diff": "", "untracked": {}}
    every = -(-len(steps) // _MOST_STEPS) or 1
    kept = [line for line in steps if line["step"] <= 3 or line["step"] % every == 0]
    lines = [_COMMENT + json.dumps({name: value}) for name, value in facts.items()]
    lines += [_COMMENT + json.dumps({"line": [line[n] for n in _STEP_FACTS]}) for line in kept]
    return "\n".join(["", _HEAD, *lines, ""])


def _read_recipe_file(path: Path) -> Logged:
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml12.parse(text)
        facts = [
            json.loads(x.removeprefix(_COMMENT)) for x in text.split("\n") if x.startswith(_COMMENT)
        ]
    except (OSError, ValueError, RecipeError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from None
    if not facts or not isinstance(recipe, dict):
        raise RunFolderError(
            f"{path}: it does not say what came out, so nothing could be compared. Nearest: "
            f"`drumline run {path}`; a run folder's recipe.yaml says it once the run is finished"
        )
    record: dict[str, Any] = {"recipe": recipe}
    steps = []
    for fact in facts:
        if "line" in fact:
            steps.append(dict(zip(_STEP_FACTS, fact["line"], strict=True)))
        else:
            record |= fact
    return Logged(str(path), record, steps)


def _read_checkpoint(path: Path) -> Logged:
    """The run that the checkpoint lies in, up to its step; or what the checkpoint knows by itself."""
    state = verify(path)
    parent = path.parent.parent
    recipe = read_manifest(path)["recipe"]
    logged = Logged(str(path), {"recipe": recipe}, [], until=state.step)
    if (parent / "record.json").is_file():
        logged = read_folder(RunFolder(parent), state.step)
    if logged.record["recipe"] is None:
        raise RunFolderError(f"{path}: it does not hold its recipe")
    record = {**logged.record, "weights": weight_facts(path)}
    if "data" not in record:
        record |= {
            "data": {"fingerprint": state.fingerprint},
            "training_sha256": state.training_sha256,
        }
    steps = [line for line in logged.steps if line["step"] <= state.step]
    return Logged(str(path), record, steps, until=state.step)
