"""`ambersafe prefetch`: fill the user's Hugging Face cache with what both stages read, for a node without a network."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ambersafe_cli import checkpoints, display, environment, fetching, hub
from ambersafe_cli import recipe as recipes
from ambersafe_cli.errors import ArchiveError, HubError, UsageError
from ambersafe_cli.plans import in_gigabytes

_CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


@dataclass(frozen=True)
class Needs:
    """A stage of a recipe, and what it reads."""

    stage: recipes.Stage
    sources: tuple[hub.Source, ...]


def flags(model: str | None, model_revision: str | None, data: str | None, data_revision: str | None) -> recipes.Flags:
    """What the command's flags say, by upstream's keys."""
    names = {"model.name_or_path": model, "model.revision": model_revision}
    return recipes.Flags({key: value for key, value in names.items() if value is not None}, data, data_revision)


def run(recipe: str, flags: recipes.Flags, overrides: Sequence[str], python: str, as_json: bool) -> None:
    """Fetch, look whether all is there, and say what to type where there is no network. Raises AmberSafeError."""
    if variable := hub.offline_by():
        raise UsageError(
            f"{variable} is set, and `ambersafe prefetch` needs the network.",
            f"`env -u {variable} ambersafe prefetch …`",
        )
    # For the libraries here and in children: one message for an error, and no bars where nobody sees them move.
    os.environ.update({f"{library}_VERBOSITY": "error" for library in ("HF_HUB", "DATASETS", "TRANSFORMERS")})
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    needs = read_needs(recipe, flags, overrides)
    sources = list(dict.fromkeys(source for need in needs for source in need.sources))
    child = environment.probe(python)
    child.require_packages()
    fetched = fetching.fetch(sources, child.python)
    verify(sources, fetched, child.python)
    commands = [_offline_command(need, child.python) for need in needs]
    if as_json:
        display.write_json({"fetched": [asdict(each) for each in fetched], "commands": commands})
        return
    for each in fetched:
        display.write(f"{' and '.join(each.parts)} {each.name} at {each.revision or 'main'}")
        display.write(f"  commit {each.commit}, {each.files} files, {in_gigabytes(each.bytes)}, in {each.folder}")
    display.write("all there. Where there is no network:" if fetched else "nothing to fetch:")
    for command in commands:
        display.write(f"  {command}")


def read_needs(recipe: str, flags: recipes.Flags, overrides: Sequence[str]) -> list[Needs]:
    """What the stages of a recipe read. Raises UsageError if it is no model and saferlhf data for either of them."""
    chosen = recipes.load(recipe)
    needs: list[Needs] = []
    for name in ("sft", "dpo"):
        try:
            stage = recipes.resolve(name, chosen, flags, overrides)
        except UsageError:
            if name == "sft":
                raise
            display.warn("the recipe has no DPO stage that could start: only what SFT reads is fetched")
            continue
        if not stage.get("model.name_or_path"):
            raise UsageError(f"The name of {stage.model} on the hub is upstream's to say.", "Give --model ORG/NAME.")
        if stage.get("datasets") not in (["saferlhf"], None):
            raise UsageError(f"Only saferlhf data can be fetched, not {stage.get('datasets')}.")
        config = {key: stage.get(key) for key in ("model.name_or_path", "model.revision", hub.TOKENIZER_KEY)}
        needs.append(Needs(stage, hub.sources(config, stage.data, stage.data_revision)))
    return needs


def _offline_command(needs: Needs, python: str) -> str:
    settings = [f"{key}={shlex.quote(os.environ[key])}" for key in _CACHES if os.environ.get(key)]
    words = shlex.join(["ambersafe", needs.stage.name, *hub.flags(needs.stage, needs.sources, python)])
    return " ".join([*settings, "HF_HUB_OFFLINE=1", words])


def verify(sources: Sequence[hub.Source], fetched: Sequence[fetching.Fetched], python: str) -> None:
    """Look at the cache as a node without a network would. Raises HubError for what is not there."""
    remote = [source for source in sources if not source.is_local]
    if not remote:
        return
    display.say("looking whether all is there without a network …")
    for source in remote:
        if lacking := hub.lacking(source):
            commit = next(each.commit for each in fetched if source.part in each.parts)
            mend = f"Give --data-revision {commit}." if source.part == "data" else "Fetch it again."
            raise HubError(f"{hub.problem(source, lacking)}, though it was fetched.", mend)
        if source.part == "model":
            try:
                checkpoints.model_shapes(hub.folder_of(source) or Path())
            except ArchiveError as error:
                raise HubError(error.message, "Delete that file and fetch it again.") from error
    answer = fetching.open_as_training(remote, python, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
    for each in fetched:
        if each.parts == ("data",) and answer["commit"] != each.commit:
            raise HubError(f"Without a network, {each.name} is of commit {answer['commit']}, not {each.commit}.")
