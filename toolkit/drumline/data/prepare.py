"""Tokenises, packs and fingerprints data once; later runs memory-map the result.

Rows are written to a locked temporary folder, which one rename publishes under its key. So a killed prepare
leaves no partial result, and of two concurrent ones the first to finish publishes.
"""

import errno
from pathlib import Path

from drumline.data import cache
from drumline.data.data_set_writer import DataSetWriter, Progress
from drumline.data.dataset_manifest import part_of_set, read_dataset_manifest
from drumline.data.media import MediaFiles, has_media
from drumline.data.publish import hidden_folder, locked, publish, remove_abandoned
from drumline.data.rows import Rows
from drumline.data.tasks import find_task
from drumline.data.validation_split import TRAIN
from drumline.errors import DataError
from drumline.files import apply_umask
from drumline.recipe.data_section import Data

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)


def _nobody(documents: int, tokens: int, share: float) -> None:
    """The progress that nobody watches."""


def prepare(data: Data, project: str | None, progress: Progress | None = None) -> Path:
    """Return the folder of prepared rows, writing it if it does not exist yet."""
    final = cache.cache_folder(data, project)
    if read_dataset_manifest(final) is not None:
        if not _has_changed(data, project, final):
            return final
        with hidden_folder(final) as aside:
            final.rename(aside / "old")
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(final)
    try:
        with hidden_folder(final) as temporary, locked(temporary):
            DataSetWriter(data, project, temporary, progress or _nobody).write()
            apply_umask(temporary, 0o777)
            publish(temporary, final)
    except OSError as error:
        elsewhere = error.filename and not str(error.filename).startswith(str(final.parent))
        if elsewhere or error.errno not in _DISK_ERRORS:
            raise
        raise DataError(
            f"{final.parent}: cannot write the prepared rows: {error.strerror or error}. Nearest: "
            "make room, or point DRUMLINE_CACHE at another folder"
        ) from None
    return final


def _has_changed(data: Data, project: str | None, folder: Path) -> bool:
    """Whether a data set of the project has other samples than when it was prepared, by those seen then.

    Or whether an image or a recording that rows name is another file.
    """
    if has_media(data):
        return MediaFiles.have_changed(folder)
    if not data.is_map_style:
        return False
    parts = {TRAIN: data} | {part_of_set(name): own for name, own in data.evaluation_sets().items()}
    for part, own in parts.items():
        rows = Rows(folder, part, find_task(own, project))
        if not rows.task.still_holds(rows):  # type: ignore[attr-defined]
            return True
    return False
