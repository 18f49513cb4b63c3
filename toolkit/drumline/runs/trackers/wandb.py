"""Weights & Biases: recipe, plan and record as config, a row per metrics line, the record as an artifact."""

from typing import Any

import wandb

from drumline.runs.folder import RunFolder

_CODE_LIMIT = 64 << 10
"""Characters of code in the config; longer code is only in the artifact, as W&B shows configs in tables."""

_INIT_S = 90.0


class WandbTracker:
    """Sends to W&B with its client; resumes the W&B run whose id is in the record."""

    def __init__(self, folder: RunFolder) -> None:
        record = folder.read_record()
        self._folder, entry = folder, record["trackers"]["wandb"]
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            init_timeout=_INIT_S,
        )
        self._run = wandb.init(
            project=entry["project"],
            entity=entry["entity"],
            id=entry["id"],
            name=folder.path.name,
            mode=entry["mode"],
            dir=str(folder.path),
            resume="allow",
            config=config_of(record),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, line: dict[str, Any]) -> None:
        """Log the line as a row of W&B's history, without `kind` and nulls."""
        self._run.log({k: v for k, v in line.items() if v is not None and k != "kind"})

    def finish(self, record: dict[str, Any]) -> None:
        """Write outcome and final weights to the summary, and record.json and recipe.yaml as an artifact."""
        self._run.config.update(config_of(record), allow_val_change=True)
        self._run.summary.update({"outcome": record["outcome"], "weights": record["weights"]})
        artifact = wandb.Artifact(f"record-{self._run.id}", type="record")
        for path in (self._folder.record_file, self._folder.recipe_file):
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)
        self._run.finish()


def config_of(record: dict[str, Any]) -> dict[str, Any]:
    """Build W&B's config: recipe, plan, and the rest of the record; long diffs and files are left out."""
    rest = {k: v for k, v in record.items() if k not in ("recipe", "plan", "weights")}
    code = rest["code"]
    if len(code["diff"]) + sum(map(len, code["untracked"].values())) > _CODE_LIMIT:
        why = "in the record's artifact"
        names = dict.fromkeys(code["untracked"], why)
        rest["code"] = {
            **code,
            "diff": "",
            "untracked": {},
            "left_out": {**code["left_out"], **names},
        }
    return {"recipe": record["recipe"], "plan": record["plan"], "record": rest}
