"""The files of transformers' processors of images and recordings, which are part of what is trained on."""

import hashlib
from pathlib import Path

from drumline.errors import DataError
from drumline.recipe.data_section import Data


def processor_file(name: str) -> Path:
    """The preprocessor_config.json of a folder, or of a model of the hub."""
    return Path(name) / "preprocessor_config.json" if name.startswith("/") else _cached(name)


def processor_digests(data: Data) -> dict[str, str]:
    """SHA-256 of the preprocessor_config.json of each section that names one, by the section's key."""
    found = {}
    for key in ("image", "audio"):
        section = getattr(data, key)
        if section is None or section.processor is None:
            continue
        path = processor_file(section.processor)
        try:
            found[f"{key}_processor"] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"data.{key}.processor: {path}: {error.strerror}") from None
    return found


def _cached(name: str) -> Path:
    """The file of a model of the hub, which `prepare` fetches where it is not cached."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "preprocessor_config.json"))
    except Exception as error:
        raise DataError(
            f"data: the processor {name} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None
