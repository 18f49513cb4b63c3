"""Models of the hub in this machine's cache: found there, or fetched into it; HF_HOME and HF_TOKEN hold."""

from pathlib import Path

from drumline.architectures.weight_files import headers_in
from drumline.errors import PlanError

_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""What a run reads of a model: weights, config, tokenizer. Pickles and other formats are not fetched."""


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder of this model's commit in the cache; None where its config is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError as error:
        raise PlanError(f"model.name: {name!r}: {error}") from None
    return Path(found).parent if isinstance(found, str) else None


def is_cached(name: str, revision: str | None) -> bool:
    """Whether the cache has this model with all of its weights."""
    folder = cached_folder(name, revision)
    try:
        return folder is not None and headers_in(folder) is not None
    except PlanError:
        return False


def fetch(name: str, revision: str | None) -> Path:
    """The folder of this model, fetched first where the cache lacks a part of it, with a progress bar.

    PlanError where it cannot be reached, is not there, or may not be read.
    """
    folder = cached_folder(name, revision)
    if folder and is_cached(name, revision):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:  # offline, it gives a folder that is not whole as it is
        fetched = Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
        if headers_in(fetched) is not None:
            return fetched
        reason = f"{fetched} holds no safetensors"
    except (OSError, HfHubHTTPError, ValueError, PlanError) as error:
        reason = str(error).strip().splitlines()[0][:300]
    what = f"{name}@{revision}" if revision else name
    raise PlanError(
        f"model.name: {what} is not in the cache whole, and was not fetched: {reason}. Nearest: "
        f"hf download {name} where there is a network, and the same HF_HOME here"
    )
