"""Completes a finished run: a fingerprint of its final weights, and facts in its recipe.yaml."""

from collections.abc import Callable

from drumline.checkpoint.retention import find_checkpoints
from drumline.errors import CheckpointError
from drumline.metrics_file import Kind, iterate_metrics, last_step_line
from drumline.runs.folder import RunFolder


def close_run(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Add weights to the record and facts to recipe.yaml; a failure is only reported through `say`."""
    from drumline.checkpoint.weights import weight_facts
    from drumline.runs.recipe_facts import facts_comment

    try:
        weights = weight_facts(find_checkpoints(folder.checkpoints)[-1])
        record = {**folder.read_record(), "weights": weights}
        last = last_step_line(folder.metrics_file) or {"step": 0}
        steps = (line for line in iterate_metrics(folder.metrics_file) if line["kind"] == Kind.STEP)
        folder.write_recipe(record["recipe"], facts_comment(record, steps, last["step"]))
        folder.note(weights=weights)  # last, because it marks the record as complete
    except (OSError, IndexError, CheckpointError) as error:
        say(f"{folder.path}: its record lacks the final weights: {error}")


def note_weights_sha256(folder: RunFolder) -> None:
    """Add the SHA-256 of all weights, for comparison with records that predate the checksum."""
    from drumline.checkpoint.weights import weights_sha256

    weights = folder.read_record()["weights"]
    if weights:
        newest = find_checkpoints(folder.checkpoints)[-1]
        folder.note(weights={**weights, "sha256": weights_sha256(newest)})
