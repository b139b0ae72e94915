"""Upload a folder to the Hugging Face hub, as the user who is logged in on this machine."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from ambersafe_cli import display, hub
from ambersafe_cli.errors import ExportError, UsageError

_OF_AN_EARLIER_ONE = [
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_model.safetensors", "adapter_config.json",
]  # fmt: skip
"""What in the repository is not in the folder goes: transformers takes model.safetensors before an index, and where
both an adapter and a model lie, programs differ in which they take."""


def require_name(repo: str) -> None:
    """Raise UsageError if there can be no repository of this name."""
    import huggingface_hub.utils as utils

    rules: Any = utils  # which does not say what of it is for others
    try:
        rules.validate_repo_id(repo)
    except rules.HFValidationError as error:
        raise UsageError(f"--push takes the name of a repository, ORG/NAME, not {repo!r}: {error}") from error


def push(folder: Path, repo: str, private: bool) -> str:
    """Make the repository if there is none, upload the folder in one commit, and return its address.

    Raises ExportError, which says how to do it later: the folder stays as it is.
    """
    words = ["hf", "upload", repo, str(folder), ".", *(["--private"] if private else [])]
    later = f"Push it later: `hf auth login`, then `{shlex.join(words)}`."
    try:
        return _push(folder, repo, private)
    except ExportError as error:
        raise ExportError(f"{error.message} The folder is there: {folder}", error.hint or later) from error
    except Exception as error:  # of the hub, of its HTTP libraries, of the system
        raise ExportError(f"{_problem(repo, error)} The folder is there: {folder}", later) from error


def _push(folder: Path, repo: str, private: bool) -> str:
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # before the import
    import huggingface_hub

    if variable := hub.offline_by():
        raise ExportError(f"Cannot push to {repo}: {variable} is set.")
    if not huggingface_hub.get_token():
        raise ExportError(f"Cannot push to {repo}: nobody is logged in at {hub.endpoint()}.")
    api = huggingface_hub.HfApi()
    name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(name).private:
        raise ExportError(
            f"{name} is there already, and everybody can see it: nothing was pushed.",
            "Make it a private one on its page, or give another name, and export again with --force.",
        )
    display.say(f"uploading to {hub.endpoint()}/{name} …")
    api.upload_folder(
        repo_id=name,
        folder_path=folder,
        commit_message="Upload a model with ambersafe-cli",
        delete_patterns=_OF_AN_EARLIER_ONE,
    )
    return f"{hub.endpoint()}/{name}"


def _problem(repo: str, error: BaseException) -> str:
    """What went wrong, on one line, and without the token whatever it says."""
    import huggingface_hub

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"Cannot push to {repo}: {hub.endpoint()} does not know the token that is logged in."
    if status == 403:
        return f"Cannot push to {repo}: the token that is logged in may not write there."
    said = " ".join(str(error).split()) or type(error).__name__
    token = huggingface_hub.get_token()
    said = said.replace(token, "***") if token else said
    return f"Cannot push to {repo} at {hub.endpoint()}: {said.rstrip('.'):.300}."
