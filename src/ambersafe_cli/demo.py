"""`ambersafe demo`: the whole way on a tiny model and a few hundred rows, with a table of before and after."""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ambersafe_cli import (
    cloning,
    display,
    environment,
    metrics,
    patches,
    recipe,
    requests,
    runs,
    sharing,
    stages,
    upstream,
)
from ambersafe_cli.errors import AmberSafeError, RunFolderError

DATA = Path(__file__).parent / "demo_data"
_BUILD_MODEL = Path(__file__).parent / "children" / "tiny_model.py"


@dataclass(frozen=True)
class Change:
    """A held-out metric before the first step of a stage and after its last."""

    stage: str
    metric: str
    before: float
    after: float


def run(clone: Path, url: str | None, python: str, plain: bool) -> int:
    """Set up, build the model, train both stages, show what changed. Returns the exit status. Raises AmberSafeError."""
    environment.probe(python).require_packages()
    with display.progress("setup") as progress:
        wanted = cloning.Wanted(url or upstream.UPSTREAM_URL, upstream.PINNED_COMMIT, patches.read_series())
        cloning.set_up(clone, wanted, force=False, progress=progress)
    model = _build_model(python)
    run_folders: dict[str, Path] = {}
    for stage in ("sft", "dpo"):
        display.say(f"--- {stage} of a tiny Llama ---")
        flags = recipe.Flags(values={"model.name_or_path": str(model)}, data=str(DATA))
        archive = runs.checkpoint(run_folders["sft"]) if stage == "dpo" else None
        prepared = stages.prepare(requests.Request(stage, "tiny", flags, (), clone, python, None, archive=archive))
        if status := stages.start(prepared, plain=plain):
            return status
        run_folders[stage] = prepared.launch.run_folder
    changes = compare(run_folders["sft"], run_folders["dpo"])
    rows = [(c.stage, c.metric, f"{c.before:.3f}", f"{c.after:.3f}") for c in changes]
    display.write_table("On rows that were held out", ("stage", "metric", "before", "after"), rows)
    for stage, folder in run_folders.items():
        display.write(f"{stage} checkpoint: {runs.checkpoint(folder)}")
    return 0


def _build_model(python: str) -> Path:
    """Build the tiny model, once in a working folder, and return its folder. Raises AmberSafeError."""
    folder = runs.folder_of_runs() / "tiny_model"
    if (folder / "config.json").is_file():
        return folder
    try:
        sharing.share_cache(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"Cannot make {folder.parent}: {error.strerror}", "Run from a folder that you can write."
        ) from error
    display.say("building a tiny Llama and its tokenizer …")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny_model-") as place:
        made = Path(place) / "tiny_model"
        child = subprocess.run(
            [python, str(_BUILD_MODEL), str(made), str(DATA / "train.jsonl")],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise AmberSafeError(f"Building the tiny model failed: {child.stderr.strip()}")
        try:
            made.rename(folder)
        except OSError as error:
            if not (folder / "config.json").is_file():  # else another demo has just made it
                raise RunFolderError(f"Cannot make {folder}: {error.strerror}", "Move it away.") from error
    return folder


def compare(sft_run: Path, dpo_run: Path) -> list[Change]:
    """What the first and the last evaluation of both runs say. Raises AmberSafeError if a run was not evaluated."""
    wanted = {
        ("SFT", sft_run): {"loss/eval": "loss (nats a response)"},
        ("DPO", dpo_run): {
            "loss/eval": "loss",
            "rewards_eval/accuracies": "reward accuracy",
            "rewards_eval/margins": "reward margin",
        },
    }
    changes = []
    for (stage, folder), names in wanted.items():
        evaluations = metrics.read_log(folder / "train.log").evaluations
        if len(evaluations) < 2:
            raise AmberSafeError(
                f"{folder / 'train.log'} holds {len(evaluations)} evaluations, not a first and a last."
            )
        first, last = evaluations[0].values, evaluations[-1].values
        changes += [Change(stage, name, first[key], last[key]) for key, name in names.items()]
    return changes
