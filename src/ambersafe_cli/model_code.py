"""What a model's config.json names to be run: code of its own, and kernels of a repository. None of it is.

A model's folder is data: see "What is trusted" in scripts/README.md. transformers asks on a terminal whether to run it;
no process of ours has one to be asked on.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ambersafe_cli import asking, files, hub
from ambersafe_cli.errors import AmberSafeError, HubError
from ambersafe_cli.findings import Finding

_SETTINGS = {"model": "config.json", "tokenizer": "tokenizer_config.json"}


def of_sources(model_and_tokenizer: Sequence[hub.Source], python: str) -> Iterator[Finding]:
    """Findings about a model and its tokenizer, for preflight."""
    for source in model_and_tokenizer:
        try:
            require_none(source, python)
        except HubError as error:
            yield Finding("error", error.message, error.hint)


def require_none(source: hub.Source, python: str) -> None:
    """Raise HubError for a model, or a tokenizer, that needs such code. What is not on this machine yet is not looked
    at."""
    folder = hub.folder_of(source)
    if folder is None:
        return
    name = _SETTINGS[source.part]
    try:
        config = json.loads(files.read_text(folder / name))
    except (OSError, ValueError, RecursionError):
        return
    if kernels := sorted(set(_kernels(config))):
        raise HubError(
            f"The {name} of the {source} names code to be fetched and run: {', '.join(kernels)}.",
            "Take attn_implementation out of it: transformers then chooses one of its own.",
        )
    if not isinstance(config, dict) or "auto_map" not in config:
        return
    request = {"part": source.part, "folder": str(folder)}
    try:  # where transformers has a class of its own for it, auto_map counts for nothing
        asking.ask(python, "open_without_code.py", request, {}, "whether it takes code of its own")
    except AmberSafeError as error:
        raise HubError(
            f"The {source} has code of its own (auto_map in its {name}), which ambersafe does not run: {error.message}",
            "Take a model that transformers itself knows, or a newer transformers.",
        ) from error


def _kernels(config: Any) -> Iterator[str]:
    """The repositories that a config, or one within it, has attention taken from."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.endswith("attn_implementation") and isinstance(value, str) and "/" in value:
            yield value
        yield from _kernels(value)
