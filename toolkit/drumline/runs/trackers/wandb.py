"""Weights & Biases: config = recipe, plan and record; a row for every step; the record as an artifact."""

from typing import Any

import wandb

from drumline.runs.folder import RunFolder

_CODE_LIMIT = 64 << 10
"""More code than this goes into the artifact alone; W&B shows the config of every run in tables."""

_INIT_S = 90.0


class WandbTracker:
    """The real client. Resumes the W&B run whose id the record holds."""

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
        """A row of the history, which has columns and no kinds; what is null stays out of it."""
        self._run.log({k: v for k, v in line.items() if v is not None and k != "kind"})

    def finish(self, record: dict[str, Any]) -> None:
        """Outcome and final weights into the summary, record.json as an artifact."""
        self._run.config.update(config_of(record), allow_val_change=True)
        self._run.summary.update({"outcome": record["outcome"], "weights": record["weights"]})
        artifact = wandb.Artifact(f"record-{self._run.id}", type="record")
        for path in (self._folder.record_file, self._folder.recipe_file):
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)
        self._run.finish()


def config_of(record: dict[str, Any]) -> dict[str, Any]:
    """recipe, plan and record, each once; of long code only which commit it was."""
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
