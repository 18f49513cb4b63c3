"""Sends an exported folder to a model hub, with the login and the address that huggingface_hub finds."""

from pathlib import Path

from drumline.errors import LaunchError


def check_login(name: str) -> None:
    """LaunchError where the name is none of a repository, or nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise LaunchError(
            f"--push {name}: {str(error).splitlines()[0]}. Nearest: --push you/{Path(name).name}"
        ) from None
    if not get_token():
        raise LaunchError(
            f"--push {name}: no login is known. Nearest: hf auth login, or HF_TOKEN in the environment"
        )


def push(folder: Path, name: str, is_public: bool) -> str:
    """Make the repository if it is not there, send all files in one commit, and return its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        made = api.create_repo(name, private=not is_public, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=made.repo_id, commit_message="Exported by drumline"
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise LaunchError(
            f"--push {name}: {str(error).strip().splitlines()[0]}; the folder {folder} is complete. Nearest: "
            f"hf upload {name} {folder}"
        ) from None
    return str(made)
