"""TensorBoard: every number of metrics.jsonl as a scalar, under `RUN/tensorboard`."""

from typing import Any

from tensorboard.summary import Writer

from drumline.runs.folder import RunFolder

_GROUPS = {"loss": "train", "lr": "train", "grad_norm": "train", "weight": "train"}


class TensorboardTracker:
    """Writes with the `tensorboard` package, which needs neither torch nor TensorFlow."""

    def __init__(self, folder: RunFolder) -> None:
        self._writer = Writer(str(folder.path / "tensorboard"))

    def log(self, line: dict[str, Any]) -> None:
        """Write the line's numbers at its step: `train/loss`, `eval/loss`, `speed/tokens_per_s`."""
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                tag = name if "/" in name else f"{_GROUPS.get(name, 'speed')}/{name}"
                self._writer.add_scalar(tag, value, line["step"])
        self._writer.flush()

    def finish(self, record: dict[str, Any]) -> None:
        """Flush and close the writer."""
        self._writer.close()
