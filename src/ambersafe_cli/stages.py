"""One stage from the command line to a finished run: everything between the flags and the exit status."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ambersafe_cli import __version__, display, environment, launch, metrics, patches, runs, upstream
from ambersafe_cli import recipe as recipes
from ambersafe_cli.errors import ArchiveError, CloneError, NoCheckpointError, RunFolderError

SAFERLHF_PATCH = "Add the saferlhf dataset"


@dataclass(frozen=True)
class Request:
    """What a user asked for with `ambersafe sft` or `ambersafe dpo`."""

    stage: recipes.StageName
    recipe: str
    flags: recipes.Flags
    overrides: tuple[str, ...]
    clone: Path
    python: str
    processes: int | None
    archive: Path | None = None


# What the flags of both commands set in upstream's config, as they stand.
_KEY_OF_FLAG = {
    "model": "model.name_or_path",
    "model_revision": "model.revision",
    "batch_size": "batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "lr": "lr",
    "epochs": "n_epochs",
    "max_length": "max_length",
    "trainer": "trainer",
    "exp_name": "exp_name",
    "seed": "seed",
    "wandb": "wandb.enabled",
    "beta": "loss.beta",
    "label_smoothing": "loss.label_smoothing",
}


def request(stage: recipes.StageName, params: Mapping[str, Any]) -> Request:
    """Read the parameters of the commands `sft` and `dpo`, by their names in cli.py."""
    values = {key: params[flag] for flag, key in _KEY_OF_FLAG.items() if flag in params}
    # Never policy_dtype=bfloat16: in bfloat16 weights an update at a learning rate of 5e-7 rounds away.
    values["model.fsdp_policy_mp"] = "bfloat16" if params["bf16"] else None
    values["loss.name"] = "ipo" if params.get("loss") == "ipo" else None
    return Request(
        stage=stage,
        recipe=params["recipe"],
        flags=recipes.Flags(values, params["data"], params["data_revision"]),
        overrides=tuple(params["overrides"] or ()),
        clone=params["folder"].absolute(),
        python=params["python"],
        processes=params["nproc"],
        archive=params.get("archive"),
    )


def run(request: Request, dry_run: bool) -> int:
    """Do what `ambersafe sft` or `ambersafe dpo` was asked for; return the exit status. Raises AmberSafeError."""
    prepared = prepare(request)
    if dry_run:
        _show_notes(prepared)
        display.write(prepared.launch.as_shell())
        return 0
    return execute(prepared)


@dataclass(frozen=True)
class Prepared:
    """A stage that is ready to start, and where its weights come from."""

    launch: launch.Launch
    clone: upstream.CloneState
    recipe: recipes.Recipe
    environment: environment.TrainingEnvironment
    sft_run: Path | None
    next_command: str


def prepare(request: Request) -> Prepared:
    """Resolve everything, without starting or writing anything. Raises AmberSafeError."""
    chosen = recipes.load(request.recipe)
    stage = recipes.resolve(request.stage, chosen, request.flags, request.overrides)
    clone = upstream.inspect(request.clone, patches.read_series())
    if stage.get("datasets") in (["saferlhf"], None) and not _has_saferlhf(clone):
        raise CloneError(f"{clone.folder} lacks the patch that adds saferlhf.", "Apply it: `ambersafe setup`.")
    sft_run = None
    if request.stage == "dpo":
        archive, sft_run = _archive(stage, request.archive)
        stage = stage.with_values({"model.archive": str(archive)})
    given = stage.get("local_run_dir")
    folder = Path(str(given)).expanduser().absolute() if given else runs.folder_for(str(stage.get("exp_name")))
    child = environment.probe(request.python)
    plan = launch.plan(stage, clone, child, folder, request.processes)
    return Prepared(plan, clone, chosen, child, sft_run, _next_command(request, plan))


# What turns the end of DPO into a folder that every other tool loads.
_TO_HUGGING_FACE = (
    "import sys, torch, transformers as t; model, checkpoint, folder = sys.argv[1:]; "
    "policy = t.AutoModelForCausalLM.from_pretrained(model); "
    "policy.load_state_dict(torch.load(checkpoint, map_location='cpu')['state']); "
    "policy.save_pretrained(folder); t.AutoTokenizer.from_pretrained(model).save_pretrained(folder)"
)


def _next_command(request: Request, plan: launch.Launch) -> str:
    """What to type next: after SFT the DPO stage alike, after DPO what makes a Hugging Face folder."""
    checkpoint = str(runs.checkpoint(plan.run_folder))
    if request.stage == "dpo":
        folder = str(plan.run_folder / "hugging_face")
        return shlex.join([plan.argv[0], "-c", _TO_HUGGING_FACE, plan.stage.model, checkpoint, folder])
    options = {
        "--recipe": None if request.recipe == recipes.DEFAULT else request.recipe,
        "--model": request.flags.values.get("model.name_or_path"),
        "--model-revision": request.flags.values.get("model.revision"),
        "--data": request.flags.data,
        "--data-revision": request.flags.data_revision,
        "--nproc": request.processes,
        "--archive": checkpoint,
    }
    given = [str(part) for flag, value in options.items() if value is not None for part in (flag, value)]
    return shlex.join(["ambersafe", "dpo", *given])


def _has_saferlhf(clone: upstream.CloneState) -> bool:
    return any(p.patch.subject == SAFERLHF_PATCH and p.state != "missing" for p in clone.patches)


def _archive(stage: recipes.Stage, flag: Path | None) -> tuple[Path, Path | None]:
    """The policy.pt that DPO starts from, and the SFT run that it belongs to if that was found here."""
    given = flag or stage.get("model.archive")
    if given:
        path = Path(str(given)).expanduser().absolute()
        path = runs.checkpoint(path) if path.is_dir() else path
        if not path.is_file():
            raise ArchiveError(f"There is no checkpoint {path}.", "--archive takes a policy.pt, or a run's folder.")
        return path, None
    run = runs.newest_finished_sft(stage.model)
    return runs.checkpoint(run), run


def _show_notes(prepared: Prepared) -> None:
    for note in prepared.launch.notes:
        display.warn(note)
    if prepared.sft_run:
        display.say(f"from the newest SFT run of this model: {prepared.sft_run}")
    if prepared.clone.edited:
        display.warn(f"the clone has local edits: {', '.join(prepared.clone.edited)}")


def execute(prepared: Prepared) -> int:
    """Run a stage to its end and return the exit status of train.py.

    Raises TrainingEnvironmentError or RunFolderError before it starts, NoCheckpointError if it left nothing.
    """
    prepared.environment.require_packages()
    plan = prepared.launch
    folder = plan.run_folder
    runs.make(folder)
    record = _record(prepared)
    runs.write(folder, record)
    _show_notes(prepared)
    display.say(f"run folder: {folder}")

    outcome = launch.run(plan, folder / "train.log")
    log = metrics.read_log(folder / "train.log")
    has_checkpoint = runs.checkpoint(folder).is_file()
    finished = outcome.exit_status == 0 and has_checkpoint
    record |= {"ended": runs.now(), "exit_status": outcome.exit_status}
    record["status"] = "finished" if finished else "interrupted" if outcome.interrupted else "failed"
    record["model"] |= {"commit": log.model_commit}
    record["data"] |= {"commit": log.data_commit}
    try:
        runs.write(folder, record)
    except RunFolderError:
        if finished:  # else the child's own failure is what the user has to see
            raise
    if outcome.exit_status == 0 and not has_checkpoint:
        raise NoCheckpointError(
            f"train.py ended without an error, but left no {runs.checkpoint(folder)}.",
            f"Look at {folder / 'train.log'}.",
        )
    if finished:
        _show_end(prepared, log)
    else:
        how = "was stopped" if outcome.interrupted else f"failed with exit status {outcome.exit_status}"
        display.say(f"{plan.stage.name} {how}; its output is in {folder / 'train.log'}")
    return outcome.exit_status


def _show_end(prepared: Prepared, log: metrics.Log) -> None:
    evaluations = log.evaluations()
    if evaluations:
        last = evaluations[-1]
        shown = [f"{key.replace('_eval', '').replace('/eval', '')} {value:.5g}" for key, value in last.values.items()]
        display.say(f"held out, after {last.examples} examples: {', '.join(shown)}")
    display.say(f"checkpoint: {runs.checkpoint(prepared.launch.run_folder)}")
    display.say(f"next: {prepared.next_command}")


def _record(prepared: Prepared) -> dict[str, Any]:
    """What run.json says of a run when it starts."""
    plan, clone, stage = prepared.launch, prepared.clone, prepared.launch.stage
    archive = stage.get("model.archive")
    return {
        "stage": stage.name,
        "status": "running",
        "started": runs.now(),
        "ended": None,
        "exit_status": None,
        "model": {"name": stage.model, "revision": stage.get("model.revision"), "commit": None},
        "data": {"name": stage.data, "revision": stage.data_revision, "commit": None},
        "sft_run": prepared.sft_run and str(prepared.sft_run),
        "archive": archive and str(archive),
        "recipe": asdict(prepared.recipe),
        "values": dict(stage.values),
        "overrides": [override.text for override in stage.overrides],
        "command": list(plan.argv),
        "environment": dict(plan.environment),
        "working_folder": str(Path.cwd()),
        "host": runs.host(),
        "pid": os.getpid(),
        "upstream": {
            "folder": str(clone.folder),
            "url": clone.url,
            "base": clone.base,
            "head": clone.head,
            "tree": clone.tree,
            "edited": list(clone.edited),
            "patches": {p.patch.name: p.state for p in clone.patches},
        },
        "ambersafe_version": __version__,
    }
