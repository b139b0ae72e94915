"""What the commands that do not train answer: setup, status, data, recipes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambersafe_cli import data as data_
from ambersafe_cli import display, environment, patches, recipe, rendering
from ambersafe_cli.errors import CloneError

if TYPE_CHECKING:
    from ambersafe_cli.upstream import CloneState


def setup(folder: Path, repo: str | None, commit: str | None, minimal: bool, force: bool) -> None:
    """Make or mend the clone and say what was done. Raises CloneError, SourceError, PatchError, GitError."""
    from ambersafe_cli import cloning, upstream

    series = patches.read_series()
    wanted = cloning.Wanted(repo or upstream.UPSTREAM_URL, commit or upstream.PINNED_COMMIT, series, minimal)
    with display.progress("setup") as progress:
        result = cloning.set_up(folder, wanted, force, progress)
    state = result.state
    for place in result.saved:
        display.warn(f"kept {place}")
    what = f"{folder} is upstream {str(state.base)[:12]} with {len(wanted.patches)} patches, at {state.head[:12]}"
    if repo and not result.changed and repo != state.url:
        display.warn(f"--repo {display.without_secrets(repo)} was not needed: the clone came from {state.url}")
    display.say(f"{what}." if result.changed else f"Nothing to do: {what} already.")
    if result.changed:
        display.say("next: `ambersafe sft`, or `ambersafe demo` to try it first")


def status(folder: Path, python: str, as_json: bool) -> None:
    """Show clone, patches and training environment; a clone that is not there is part of the answer."""
    from ambersafe_cli import upstream

    child = environment.probe(python)
    clone = None
    missing = ""
    try:
        clone = upstream.inspect(folder, patches.read_series())
    except CloneError as error:
        missing = error.message
    if as_json:
        display.write_json(
            {"clone": clone and _clone_json(clone), "training": {**asdict(child), "missing": child.missing}}
        )
        return
    if clone is None:
        display.write(f"clone      {missing}")
    else:
        display.write(f"clone      {clone.folder}")
        display.write(f"from       {clone.url}")
        display.write(f"base       {clone.base or 'not known: it does not hold the pinned commit'}")
        display.write(f"head       {clone.head}")
        display.write(f"edited     {', '.join(clone.edited) or 'no'}")
        display.write(f"on top     {', '.join(clone.foreign) or 'nothing but patches'}")
        display.write_table("", ("patch", "state"), [(p.patch.name, p.state) for p in clone.patches])
    display.write(f"python     {child.python} ({child.python_version})")
    display.write(
        f"GPUs       {', '.join(child.gpus) or 'none'}{'' if child.cuda else ' (torch is built for the CPU)'}"
    )
    rows = [(name, version or "missing") for name, version in child.versions.items()]
    display.write_table("", ("package", "version"), rows)


def _clone_json(clone: "CloneState") -> dict[str, Any]:
    return {
        "folder": str(clone.folder),
        "url": clone.url,
        "base": clone.base,
        "head": clone.head,
        "tree": clone.tree,
        "edited": clone.edited,
        "on_top": clone.foreign,
        "patches": [{"name": p.patch.name, "state": p.state} for p in clone.patches],
    }


def data(recipe_name: str, flags: recipe.Flags, template: str | None, python: str, as_json: bool) -> None:
    """Count the rows that a recipe, or --data, would train on, and show the first example as a template renders it.

    Raises DataError, UsageError, RecipeError, and for the template chat HubError and TrainingEnvironmentError.
    """
    chosen = recipe.load(recipe_name)
    place, revision = recipe.resolve_data(chosen, flags)
    tokenizer = rendering.tokenizer_of(chosen, flags) if template == "chat" else None
    summaries = data_.summarize(place, revision)
    example = None
    if template:
        by = None if template == "none" else template
        prompt, answer = rendering.render(*data_.first_example(), by, tokenizer, python)
        example = {"template": template, "prompt": prompt, "chosen": answer}
    if as_json:
        counts = {name: asdict(summary) for name, summary in summaries.items()}
        display.write_json({"data": place, "revision": revision, **counts, **({"example": example} if example else {})})
        return
    labels = {
        "rows": "rows",
        "kept": "kept: exactly one response is safe",
        "both_safe": "dropped: both are safe",
        "both_unsafe": "dropped: both are unsafe",
        "prompts": "prompts",
        "sft_examples": "SFT examples an epoch",
        "pairs": "DPO pairs an epoch",
    }
    rows = [(label, *(f"{getattr(s, key):,}" for s in summaries.values())) for key, label in labels.items()]
    for text in ("prompt", "chosen", "rejected"):
        for label, percentile in data_.PERCENTILES.items():
            name = f"{text}: characters, " + ("longest" if percentile == 100 else f"{percentile} % are up to")
            rows.append((name, *(f"{s.lengths[text][label]:,}" for s in summaries.values())))
    display.write_table(f"{place}{f' at {revision}' if revision else ''}", ("", *summaries), rows)
    if example:
        display.write(f"The first example with the template {template}, as JSON writes it:")
        for part in ("prompt", "chosen"):
            display.write(f"{part}  {json.dumps(example[part], ensure_ascii=False)}")


def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes in the package, or print one. Raises RecipeError."""
    if as_json:
        chosen = [recipe.load(each) for each in ([name] if name else recipe.names())]
        display.write_json([asdict(each) for each in chosen])
    elif name:
        display.write(recipe.path_of(name).read_text(encoding="utf-8").rstrip("\n"))
    else:
        rows = [(each, recipe.load(each).description) for each in recipe.names()]
        display.write_table("", ("recipe", "what for"), rows)
