"""Finds the recipe with its record that `drumline export --push` has put beside a model on the hub."""

from pathlib import Path

from drumline.errors import RunFolderError

RECIPE = "drumline/recipe.yaml"
"""Where it lies in the repository."""


def fetch_recipe(where: str) -> Path:
    """Download the recipe of `hub:NAME` or `hub:NAME@REVISION`; RunFolderError where there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    name, _, revision = where.removeprefix("hub:").partition("@")
    try:
        return Path(hf_hub_download(name, RECIPE, revision=revision or None))
    except LocalEntryNotFoundError:
        raise RunFolderError(
            f"{where}: the hub cannot be reached, and the recipe is not in the local cache"
        ) from None
    except EntryNotFoundError:
        raise RunFolderError(
            f"{where}: it has no {RECIPE}, so drumline did not export it"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise RunFolderError(f"{where}: {str(error).strip().splitlines()[0]}") from None
