"""What a run leaves when it is done: its final weights in a few numbers, and a recipe.yaml that tells."""

from collections.abc import Callable

from toolkit.checkpoint.shelf import find_checkpoints
from toolkit.errors import CheckpointError
from toolkit.runs.folder import RunFolder


def close_run(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Add both; a disk that refuses leaves the run finished, and is told."""
    from toolkit.checkpoint.weights import weight_facts
    from toolkit.runs.logged import facts_comment, read_folder

    try:
        weights = weight_facts(find_checkpoints(folder.checkpoints)[-1])
        logged = read_folder(folder)
        record = {**logged.record, "weights": weights}
        folder.write_recipe(logged.recipe, facts_comment(record, logged.steps))
        folder.note(weights=weights)  # last: a record that has them is complete
    except (OSError, IndexError, CheckpointError) as error:
        say(f"{folder.path}: its record lacks the final weights: {error}")
