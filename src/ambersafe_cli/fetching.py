"""From the Hugging Face hub into the user's cache: models file by file, data as the training interpreter loads it."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambersafe_cli import display, hub
from ambersafe_cli.errors import AmberSafeError, DataError, HubError, UsageError
from ambersafe_cli.plans import in_gigabytes

_OPEN_AS_TRAINING = Path(__file__).parent / "children" / "open_as_training.py"
_SAFERLHF = Path(__file__).parent / "saferlhf.py"

_TOKENIZER_ENDINGS = (".json", ".model", ".txt", ".tiktoken", ".spm", ".vocab", ".jinja")
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Fetched:
    """A repository whose files are in the cache: at which commit, how many that training reads, of how many bytes."""

    parts: tuple[str, ...]
    name: str
    revision: str | None
    commit: str
    files: int
    bytes: int
    folder: str


def fetch(sources: Sequence[hub.Source], python: str) -> list[Fetched]:
    """Fetch every source that is no local path. Raises HubError for what cannot be had, UsageError for no name."""
    parts: dict[tuple[str, str | None], list[hub.Source]] = {}
    for source in sources:
        if source.is_local:
            lacking = hub.lacking(source)
            if lacking:
                raise HubError(f"{hub.problem(source, lacking)}.", "Nothing is fetched for a local path.")
            display.say(f"{source}: a local path, nothing to fetch")
        elif not source.could_be_fetched:
            raise UsageError(f"There is no {source}.", "--model takes a folder, or a name on the hub (ORG/NAME).")
        elif source.part != "data":
            parts.setdefault((source.name, source.revision), []).append(source)
    found = [_fetch_model(group) for group in parts.values()]
    if remote := [source for source in sources if not source.is_local]:
        display.say(f"opening {', '.join(map(str, remote))} as training does …")
        data = open_as_training(remote, python, {})
        found += [_as_fetched(source, data) for source in remote if source.part == "data"]
    return found


def choose_files(names: Collection[str], weights: Collection[str]) -> list[str]:
    """The files of a repository that training reads: its configs, what a tokenizer may need, and these weights."""
    chosen = []
    for name in names:
        folder, _, file = name.rpartition("/")
        is_text = file.endswith(_TOKENIZER_ENDINGS) and not file.endswith(".index.json")
        if name in weights or (is_text and folder in ("", _TEMPLATES)):
            chosen.append(name)
    return sorted(chosen)


def _fetch_model(sources: Sequence[hub.Source]) -> Fetched:
    """Fetch a model, or a tokenizer that has a name of its own, at the commit that its revision stands for now.

    The name of the revision is written into the cache when everything else is there, so that a fetch that is cut off
    takes nothing away from who works offline with an older commit.
    """
    import huggingface_hub

    first = sources[0]
    try:
        info = huggingface_hub.HfApi().model_info(first.name, revision=first.revision)
        commit = str(info.sha)
        names = {file.rfilename for file in info.siblings or []}
        weights = _weights(first, names, commit) if first.part == "model" else []
        files = choose_files(names, weights)
        if first.part == "model" and "config.json" not in names:
            raise HubError(f"The {first} has no config.json: it is no model that transformers could load.")
        if not files:
            raise HubError(f"The {first} has no file of a tokenizer.")
        # One after the other: a thread that downloads would not hear of a Ctrl-C before its file has ended.
        planned = [huggingface_hub.hf_hub_download(first.name, f, revision=commit, dry_run=True) for f in files]
        size = sum(file.file_size or 0 for file in planned)
        missing = sum(file.file_size or 0 for file in planned if file.will_download)
        display.say(f"{first}: {len(files)} files, {in_gigabytes(size)}, of which {in_gigabytes(missing)} to fetch …")
        _require_disk(first, missing)
        for file in files:
            huggingface_hub.hf_hub_download(first.name, file, revision=commit)
        known = "config.json" if "config.json" in files else files[0]
        named = Path(huggingface_hub.hf_hub_download(first.name, known, revision=first.revision))
    except HubError:
        raise
    except Exception as error:  # of the hub, of its two HTTP libraries, of the system
        raise failure(first, error) from error
    folder = named.parents[known.count("/")]
    if folder.name != commit:
        raise HubError(f"The {first} was changed while it was fetched.", "Fetch it again.")
    return Fetched(tuple(s.part for s in sources), first.name, first.revision, commit, len(files), size, str(folder))


def _weights(source: hub.Source, names: Collection[str], commit: str) -> list[str]:
    """The weights that transformers would load of a repository, with the index that lists them."""
    import huggingface_hub

    first = next((name for name in hub.WEIGHTS if name in names), None)
    if first is None:
        raise HubError(
            f"The {source} has no weights that transformers could load: neither {' nor '.join(hub.WEIGHTS)}.",
            "Is it an adapter, or of another format? --model takes a whole model.",
        )
    if not first.endswith(".index.json"):
        return [first]
    index = Path(huggingface_hub.hf_hub_download(source.name, first, revision=commit))
    shards = hub.shards(index)
    if lost := sorted(set(shards) - set(names)):
        raise HubError(f"The {source} is not whole on the hub: it lacks {', '.join(lost[:3])}.")
    return [first, *shards]


def _require_disk(source: hub.Source, size: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if size > free:
        raise HubError(
            f"The {source} needs {in_gigabytes(size)} more in {cache}, where {in_gigabytes(free)} are free.",
            "Make room, or set HF_HOME to a folder on a larger disk.",
        )


def _as_fetched(source: hub.Source, data: Mapping[str, Any]) -> Fetched:
    if not data["commit"]:
        raise HubError(f"The {source} is of no commit that could be found again, in {data['folder']}.")
    return Fetched(
        ("data",), source.name, source.revision, data["commit"], data["files"], data["bytes"], data["folder"]
    )


def open_as_training(sources: Sequence[hub.Source], python: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Have the training interpreter open them, with these environment variables, and say what it found of the data;
    see children/open_as_training.py. Raises HubError if it cannot."""
    data = next((source for source in sources if source.part == "data"), None)
    request = {"saferlhf": str(_SAFERLHF), "sources": [[s.part, s.name, s.revision] for s in sources]}
    rows = {"SAFERLHF_DATASET": data.name, "SAFERLHF_REVISION": data.revision or ""} if data else {}
    inherited = {key: value for key, value in os.environ.items() if key != "HF_DATASETS_OFFLINE"}
    child = subprocess.run(
        [python, str(_OPEN_AS_TRAINING), json.dumps(request)],
        env={**inherited, **rows, **settings},
        stdin=subprocess.DEVNULL,  # or a model with code of its own asks whether to run it
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise HubError(
            f"{python} ended with {child.returncode} while it opened {', '.join(map(str, sources))}."
        ) from None
    if "error" not in answer:
        return answer
    error = answer["error"]
    source = sources[error["index"]]
    if not settings:
        raise _failure(source, error["kinds"], error["numbers"], error["said"])
    raise HubError(f"Without a network the {source} cannot be opened: {error['said']}", "Fetch it again.")


def failure(source: hub.Source, error: BaseException) -> AmberSafeError:
    """What went wrong, in the words of this program."""
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found and found not in chain:
        chain.append(found)
        found = found.__cause__ or found.__context__
    kinds = [base.__name__ for each in chain for base in type(each).__mro__]
    return _failure(source, kinds, [e.errno for e in chain if isinstance(e, OSError) and e.errno], str(error))


def _failure(source: hub.Source, kinds: Sequence[str], numbers: Collection[int], said: str) -> AmberSafeError:
    """The same by the classes and error numbers of a chain of exceptions."""

    endpoint = hub.endpoint()
    login = "`hf auth login` on this machine, with an account that may read it."
    if set(numbers) & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return HubError(f"The disk is full: no room for the {source}.", "Make room and fetch again: it goes on.")
    if "GatedRepoError" in kinds or "gated dataset" in said:
        page = f"{endpoint}/{'datasets/' if source.part == 'data' else ''}{source.name}"
        return HubError(f"The {source} is gated.", f"Ask for access at {page}, then {login}")
    if "RevisionNotFoundError" in kinds:
        flag = "--data-revision" if source.part == "data" else "--model-revision"
        return HubError(
            f"There is no {source} on {endpoint}: no such revision.", f"{flag} takes a branch, tag or commit."
        )
    if "RepositoryNotFoundError" in kinds:
        return HubError(f"There is no {source} on {endpoint}.", f"Mind the spelling; if it is private: {login}")
    if "ValueError" in kinds and "HfHubHTTPError" not in kinds and not numbers:
        kind = DataError if source.part == "data" else HubError
        return kind(f"The {source} cannot be used: {' '.join(said.split())}")
    first = said.strip().splitlines()[0] if said.strip() else kinds[0] if kinds else "no answer"
    return HubError(
        f"Cannot fetch the {source} from {endpoint}: {first}",
        "Is there a network here? Fetched again, it goes on where it was.",
    )
