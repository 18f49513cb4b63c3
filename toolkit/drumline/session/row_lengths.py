"""The longest row that a run will read: its order is known before it starts."""

from pathlib import Path

from drumline.data.dataset_manifest import DatasetManifest, read_dataset_manifest
from drumline.plan.model import Plan

_AT_ONCE = 1_000_000


def manifest_of_run(plan: Plan) -> DatasetManifest | None:
    """The manifest of the plan's prepared data, as far as the run reads them; None if there are none."""
    manifest = read_dataset_manifest(Path(plan.data.cache)) if plan.data.cache else None
    return manifest.with_rows_of(plan.data.row_tokens) if manifest else None


def longest_row(plan: Plan) -> int | None:
    """Input tokens of the longest row of the plan's steps and of its evaluation.

    None where that is the longest of all prepared rows: for a run of an epoch or more, for packed rows, and
    for those of a task of the project's own.
    """
    manifest = read_dataset_manifest(Path(plan.data.cache)) if plan.data.cache else None
    if manifest is None or manifest.longest is None:
        return None
    clock = plan.clock()
    begin, end = clock.start.slot, clock.place(plan.steps.total).slot
    if end - begin >= clock.samples:
        return None
    from drumline.data.rows import lengths_of

    assert plan.data.cache
    folder = Path(plan.data.cache)
    train = lengths_of(folder, "train", manifest.sequences)
    parts = manifest.evaluation_parts.values()
    evaluated = [lengths_of(folder, part, manifest.sequences) for part in parts]
    read = 0
    for first in range(begin, end, _AT_ONCE):
        places = plan.samples_at(first, min(end, first + _AT_ONCE))
        read = max(read, int(train[places].max()))
    longest = int(train.max())
    for lengths in evaluated:
        longest = max(longest, int(lengths.max()))
        if plan.recipe.row_evaluation:
            read = max(read, int(lengths.max()))
    # A row's last token can be a target only, which is no input: the same for all rows.
    return manifest.longest - (longest - read)
