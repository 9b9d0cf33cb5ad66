"""Models on the Hugging Face hub: their names, downloads and uploads."""

import re
from pathlib import Path

from fastlangevin._version import __version__
from fastlangevin.optional import require

MODEL = "model.safetensors"  # the file of a model in its repository
_NAME = re.compile(r"hf:/{0,2}(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_hub_name(path: str | Path) -> bool:
    """Return whether a path is a name on the hub, which begins with "hf:"."""
    return str(path).startswith("hf:")


def download(name: str | Path) -> Path:
    """Return the file of the model "hf:owner/name" or "hf:owner/name@revision".

    It comes from the library's cache if the hub has no newer one or cannot be reached. Raises
    ValueError for another form of name, ImportError without huggingface_hub, and OSError if there
    is no such file.
    """
    match = _NAME.fullmatch(str(name))
    if match is None:
        raise ValueError(
            f"a model on the hub must be hf:owner/name or hf:owner/name@revision, got {str(name)!r}"
        )
    hub = require("huggingface_hub", "hub", "a model on the hub")
    try:
        return Path(
            hub.hf_hub_download(
                match["repo"], MODEL, revision=match["revision"],
                library_name="fastlangevin", library_version=__version__,
            )
        )  # fmt: skip
    except Exception as error:  # the library also raises the errors of its HTTP client
        raise _hub_error(f"{name} could not be downloaded", error) from error


def upload(repo: str, folder: Path, private: bool | None, message: str) -> str:
    """Create the repository "owner/name" if it does not exist, add the files, return its address.

    Raises ImportError without huggingface_hub, and OSError if the hub refuses.
    """
    hub = require("huggingface_hub", "hub", "a model on the hub")
    try:
        api = hub.HfApi(library_name="fastlangevin", library_version=__version__)
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:
        raise _hub_error(f"push_to_hub: {repo} could not be written", error) from error
    return str(created)


def _hub_error(what: str, error: Exception) -> OSError:
    lines = str(error).split("\n")  # the rest is advice of many lines
    return OSError(f"{what}: {next((line for line in lines if line), type(error).__name__)}")
