"""The files of transformers' processors of images and recordings, which are part of what is trained on."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from drumline.errors import DataError
from drumline.recipe.data_section import Data

_OF_CHATS = (
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a processor of images and text, of which it has some."""


def processor_file(name: str) -> Path:
    """The preprocessor_config.json of a folder or a model of the hub, or the config.json of one of timm."""
    file = "preprocessor_config.json"
    if not name.startswith("/"):
        return _cached(name, "config.json" if name.startswith("timm/") else file)
    path = Path(name) / file
    of_timm = Path(name) / "config.json"
    if path.exists() or not of_timm.is_file() or b"pretrained_cfg" not in of_timm.read_bytes():
        return path
    return of_timm


def processor_digests(data: Data) -> dict[str, str]:
    """SHA-256 of the files of the processor of each section that names one, by the section's key."""
    found = {}
    for key in ("image", "audio"):
        section = getattr(data, key)
        if section is None or section.processor is None:
            continue
        digest = hashlib.sha256()
        if data.is_chat_with_images:
            digest.update(json.dumps(section.options, sort_keys=True).encode())
            paths = _files_of_chats(section.processor)
        else:
            paths = [processor_file(section.processor)]
        for path in paths:
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise DataError(f"data.{key}.processor: {path}: {error.strerror}") from None
        found[f"{key}_processor"] = digest.hexdigest()
    return found


def save_processor(data: Data, target: Path) -> None:
    """Write the files of the processors that a recipe names beside an exported model."""
    if data.audio is not None:
        from drumline.data.audio import AudioPipeline

        AudioPipeline(data.audio).extractor.save_pretrained(target)
    if data.image is None or data.image.processor is None or data.image.transform is not None:
        return
    name = data.image.processor
    if data.is_chat_with_images:
        for path in _files_of_chats(name):
            _copy_with(data.image.options, path, target / path.name)
        return
    for path in [processor_file(name)]:
        if path.name != "config.json":  # which an export has of its own
            shutil.copyfile(path, target / path.name)


def _copy_with(options: dict[str, Any], path: Path, target: Path) -> None:
    """A file of a processor, with the options that its images were processed with."""
    shutil.copyfile(path, target)
    if not options or path.suffix != ".json" or path.name == "chat_template.json":
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    is_whole = path.name == "processor_config.json"
    if is_whole and "image_processor" not in config:
        return
    (config["image_processor"] if is_whole else config).update(options)
    target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _files_of_chats(name: str) -> list[Path]:
    """The files that say what a processor of images and text does; DataError where there is none."""
    if name.startswith("/"):
        found = [Path(name) / file for file in _OF_CHATS if (Path(name) / file).is_file()]
    else:
        from huggingface_hub import file_exists, try_to_load_from_cache

        found = []
        for file in _OF_CHATS:
            cached = try_to_load_from_cache(name, file)
            if isinstance(cached, str):
                found.append(Path(cached))
            elif cached is None and not _is_offline() and file_exists(name, file):
                found.append(_cached(name, file))
    if not found:
        raise DataError(
            f"data.image.processor: {name} has none of {', '.join(_OF_CHATS[:2])}. Nearest: the folder of "
            "the model that reads the images"
        )
    return found


def _is_offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _cached(name: str, file: str) -> Path:
    """A file of a model of the hub, which `prepare` fetches where it is not cached."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:
        raise DataError(
            f"data: the processor {name} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None
