"""What of a run's model, tokenizer and data is on this machine, in folders or the user's Hugging Face cache.

Nothing here asks the network.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ambersafe_cli import files
from ambersafe_cli import recipe as recipes
from ambersafe_cli.display import without_secrets
from ambersafe_cli.files import expand
from ambersafe_cli.overrides import assign

TOKENIZER_KEY = "model.tokenizer_name_or_path"

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
ROWS = "its rows"
# As transformers looks for weights: the first of these that is there is what it loads.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What a tokenizer is built from, one of them at least; the rest of its files only says how.
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "*.spm", "vocab*", "*vocab.*")


@dataclass(frozen=True)
class Source:
    """Where a part of a run comes from: a local path, or a name on the hub and its branch, tag or commit (None: main).

    A tokenizer without a name of its own has the model's.
    """

    part: Literal["model", "tokenizer", "data"]
    name: str
    revision: str | None

    @property
    def is_local(self) -> bool:
        return Path(self.name).exists() if self.part == "data" else Path(self.name).is_dir()

    @property
    def could_be_fetched(self) -> bool:
        """Whether it is no local path, and has a name that the hub could know."""
        return not self.is_local and bool(_NAME.fullmatch(self.name))

    def __str__(self) -> str:
        what = "tokenizer of" if self.part == "tokenizer" else self.part
        return f"{what} {self.name}" + (f" at {self.revision}" if self.revision else "")


def sources(config: Mapping[str, Any], data: str, data_revision: str | None) -> tuple[Source, ...]:
    """What a run reads, from its config by upstream's keys; without data where that is empty."""
    name, revision = str(config["model.name_or_path"]), config.get("model.revision") or None
    own = config.get(TOKENIZER_KEY)
    tokenizer = Source("tokenizer", str(own), None) if own else Source("tokenizer", name, revision)
    rows = [Source("data", data, data_revision)] if data else []
    return (Source("model", name, revision), tokenizer, *rows)


def offline_by() -> str | None:
    """The environment variable that keeps the libraries off the network, if one does."""
    return next((key for key in _OFFLINE if os.environ.get(key, "").lower() in ("1", "true", "yes", "on")), None)


def folder_of(source: Source) -> Path | None:
    """The files of a model or tokenizer on this machine: its folder, or its snapshot in the cache; None if neither."""
    if source.is_local:
        return Path(source.name)
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        if found := _cached(source, file, "model"):
            return found.parent
    return None


def _cached(source: Source, file: str, kind: str) -> Path | None:
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(
            source.name, file, revision=source.revision, repo_type=kind if kind == "dataset" else None
        )
    except ValueError:  # no name that the hub could have
        return None
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def problem(source: Source, files: Sequence[str]) -> str:
    """That a source lacks these, as a sentence without its end."""
    if not source.is_local and not source.could_be_fetched:
        return f"There is no {source}"
    what = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    if source.is_local:
        return f"The {source} lacks {what}"
    if folder_of(source) is None if source.part != "data" else files == [ROWS]:
        return f"The {source} is not in the Hugging Face cache"
    return f"The {source} is not whole in the Hugging Face cache, which lacks {what}"


def endpoint() -> str:
    """Where the hub is, for people: HF_ENDPOINT may hold a password."""
    from huggingface_hub import constants

    return without_secrets(str(constants.ENDPOINT))


def lacking(source: Source) -> list[str]:
    """What of a source is not on this machine, in words that go behind "it lacks"; empty if all of it is there."""
    if source.part == "data":
        return [] if source.is_local else _lacking_rows(source)
    folder = folder_of(source)
    if folder is None:
        return ["config.json", WEIGHTS[0]] if source.part == "model" else ["tokenizer.json"]
    if source.part == "model":
        return [*([] if (folder / "config.json").is_file() else ["config.json"]), *lacking_weights(folder)]
    return [] if any(_any_file(folder, pattern) for pattern in _VOCABULARIES) else ["tokenizer.json"]


def _any_file(folder: Path, pattern: str) -> bool:
    return any(path.is_file() for path in folder.glob(pattern))


def lacking_weights(folder: Path) -> list[str]:
    """The files of weights that a folder lacks of those that transformers would load from it."""
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        return [WEIGHTS[0]]
    try:
        return [shard for shard in shards(folder / first) if not (folder / shard).is_file()]
    except ValueError:
        return [f"a whole {first}"]


def shards(path: Path) -> list[str]:
    """The files that an index of weights lists; none if this is no index. Raises ValueError if it is not whole."""
    if not path.name.endswith(".index.json"):
        return []
    try:
        found = sorted({str(file) for file in json.loads(files.read_text(path))["weight_map"].values()})
        if any(not 0 < len(os.fsencode(name)) < 256 for name in found):
            raise TypeError("no names of files")
        return found
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of weights") from error


def _lacking_rows(source: Source) -> list[str]:
    """Whether get_saferlhf would find the rows without a network; saferlhf.py says how it looks."""
    commits = [path.name for path in sorted(_prepared(source.name), key=lambda path: path.stat().st_mtime)]
    if not commits:
        return [ROWS]
    card = _cached(source, "README.md", "dataset")
    wanted = card.parent.name if card else source.revision
    if wanted and not _COMMIT.fullmatch(wanted):
        return [f"the README.md by which the commit of {wanted} is known"]
    if wanted and wanted not in commits:
        return [ROWS]
    if wanted not in (None, commits[-1]) and offline_by():  # then `datasets` takes those that it prepared last
        return [f"{ROWS} as those loaded last, which are of commit {commits[-1]}"]
    return []


def _prepared(name: str) -> Iterator[Path]:
    """The folders in which `datasets` keeps rows of a dataset, each named after the commit that they are of."""
    from huggingface_hub import constants

    home = expand(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    # It writes Org/MyRows as Org___my_rows.
    wanted = name.replace("/", "").replace("_", "").lower()
    for folder in home.glob("*"):
        if folder.name.replace("_", "").lower() == wanted:
            yield from (
                path.parent for path in folder.glob("*/*/*/dataset_info.json") if _COMMIT.fullmatch(path.parts[-2])
            )


def flags(stage: recipes.Stage, parts: Sequence[Source], python: str) -> list[str]:
    """The words behind `ambersafe prefetch`, or a stage, by which it reads just these sources: those that the recipe
    does not say itself."""
    chosen = recipes.load(stage.recipe)
    by_part = {source.part: source for source in parts}
    model, tokenizer, data = by_part["model"], by_part["tokenizer"], by_part.get("data")
    values = chosen.values[stage.name]
    words = [] if stage.recipe == recipes.DEFAULT else ["--recipe", stage.recipe]
    if (model.name, model.revision) != (values.get("model.name_or_path"), values.get("model.revision")):
        words += ["--model", model.name, *(["--model-revision", model.revision] if model.revision else [])]
    if data and (data.name, data.revision) != (chosen.data or recipes.HUB_DATASET, chosen.data_revision):
        words += ["--data", data.name, *(["--data-revision", data.revision] if data.revision else [])]
    if Path(python) != Path(sys.executable).absolute():
        words += ["--python", python]
    is_own = (tokenizer.name, tokenizer.revision) != (model.name, model.revision)
    own = tokenizer.name if is_own else None
    return [*words, *([assign(TOKENIZER_KEY, own)] if own != values.get(TOKENIZER_KEY) else [])]


def prefetch_command(stage: recipes.Stage, parts: Sequence[Source], python: str) -> str:
    """What to type where there is a network, so that this stage finds all it reads in the cache."""
    return shlex.join(["ambersafe", "prefetch", *flags(stage, parts, python)])
