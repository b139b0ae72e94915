"""One stage from the command line to a finished run: everything between the flags and the exit status."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambersafe_cli import __version__, attempts, display, environment, launch, patches, runs, upstream
from ambersafe_cli import recipe as recipes
from ambersafe_cli.errors import ArchiveError, CloneError, UsageError

if TYPE_CHECKING:
    from ambersafe_cli.overrides import Value

SAFERLHF_PATCH = "Add the saferlhf dataset"
RESUME_PATCH = "Go on from a checkpoint"


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
    "keep_best": "keep_best",
    "beta": "loss.beta",
    "label_smoothing": "loss.label_smoothing",
}


def request(stage: recipes.StageName, params: Mapping[str, Any]) -> Request:
    """Read the parameters of the commands `sft` and `dpo`, by their names in cli.py."""
    values: dict[str, Value] = {k: params[flag] for flag, k in _KEY_OF_FLAG.items() if params.get(flag) is not None}
    if params["bf16"]:
        # Never policy_dtype=bfloat16: in bfloat16 weights an update at a learning rate of 5e-7 rounds away.
        values["model.fsdp_policy_mp"] = "bfloat16"
    if params.get("loss") == "ipo":
        values["loss.name"] = "ipo"
    if params["keep"]:
        values["keep_checkpoints"] = None if params["keep"] == "all" else _number(params["keep"], "--keep")
    if params["save_every"]:
        minutes = params["save_every"].endswith("m")
        number = _number(params["save_every"].removesuffix("m"), "--save-every")
        values["save_every_minutes" if minutes else "save_every_examples"] = number
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


def _number(text: str, flag: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UsageError(f"Invalid value for '{flag}': {text!r}.", "`ambersafe sft --help` says what it takes.")
    return int(text)


def run(request: Request, dry_run: bool) -> int:
    """Do what `ambersafe sft` or `ambersafe dpo` was asked for; return the exit status. Raises AmberSafeError."""
    prepared = prepare(request)
    if dry_run:
        _show_notes(prepared)
        display.write(prepared.launch.as_shell())
        return 0
    return start(prepared)


def start(prepared: "Prepared") -> int:
    """Make the run folder and run a prepared stage to its end; return the exit status. Raises AmberSafeError."""
    prepared.environment.require_packages()
    folder = prepared.launch.run_folder
    runs.make(folder)
    _show_notes(prepared)
    return attempts.run(prepared.launch, _record(prepared))


@dataclass(frozen=True)
class Prepared:
    """A stage that is ready to start, and where its weights come from."""

    stage: recipes.Stage
    launch: launch.Launch
    clone: upstream.CloneState
    recipe: recipes.Recipe
    environment: environment.TrainingEnvironment
    sft_run: Path | None
    next_command: list[str]


def prepare(request: Request) -> Prepared:
    """Resolve everything, without starting or writing anything. Raises AmberSafeError."""
    chosen = recipes.load(request.recipe)
    stage = recipes.resolve(request.stage, chosen, request.flags, request.overrides)
    clone = upstream.inspect(request.clone, patches.read_series())
    if stage.get("datasets") in (["saferlhf"], None) and not _has(clone, SAFERLHF_PATCH):
        raise CloneError(f"{clone.folder} lacks the patch that adds saferlhf.", "Apply it: `ambersafe setup`.")
    sft_run = None
    if request.stage == "dpo":
        archive, sft_run = _archive(stage, request.archive)
        stage = stage.with_values({"model.archive": str(archive)})
    given = stage.get("local_run_dir")
    folder = Path(str(given)).expanduser().absolute() if given else runs.folder_for(str(stage.get("exp_name")))
    child = environment.probe(request.python)
    stage, plan = launch.plan(stage, clone, child, folder, request.processes)
    return Prepared(stage, plan, clone, chosen, child, sft_run, _next_command(request, stage, plan))


# What turns the end of DPO into a folder that every other tool loads.
_TO_HUGGING_FACE = (
    "import sys, torch, transformers as t; model, checkpoint, folder = sys.argv[1:]; "
    "policy = t.AutoModelForCausalLM.from_pretrained(model); "
    "policy.load_state_dict(torch.load(checkpoint, map_location='cpu')['state']); "
    "policy.save_pretrained(folder); t.AutoTokenizer.from_pretrained(model).save_pretrained(folder)"
)


def _next_command(request: Request, stage: recipes.Stage, plan: launch.Launch) -> list[str]:
    """What to type next: after SFT the DPO stage alike, after DPO what makes a Hugging Face folder."""
    checkpoint = str(runs.checkpoint(plan.run_folder))
    if request.stage == "dpo":
        folder = str(plan.run_folder / "hugging_face")
        return [plan.argv[0], "-c", _TO_HUGGING_FACE, stage.model, checkpoint, folder]
    options = {
        "--recipe": None if request.recipe == recipes.DEFAULT else request.recipe,
        "--model": request.flags.values.get("model.name_or_path"),
        "--model-revision": request.flags.values.get("model.revision"),
        "--data": request.flags.data,
        "--data-revision": request.flags.data_revision,
        "--nproc": request.processes,
        "--archive": checkpoint,
        "--dir": None if request.clone == Path.cwd() / upstream.DEFAULT_FOLDER else request.clone,
    }
    given = [str(part) for flag, value in options.items() if value is not None for part in (flag, value)]
    return ["ambersafe", "dpo", *given]


def _has(clone: upstream.CloneState, subject: str) -> bool:
    return any(p.patch.subject == subject and p.state != "missing" for p in clone.patches)


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


def _record(prepared: Prepared) -> dict[str, Any]:
    """What run.json says of a run when it starts."""
    plan, clone, stage = prepared.launch, prepared.clone, prepared.stage
    archive = stage.get("model.archive")
    return {
        "stage": stage.name,
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
        "next_command": prepared.next_command,
        "upstream": {
            "folder": str(clone.folder),
            "url": clone.url,
            "base": clone.base,
            "head": clone.head,
            "tree": clone.tree,
            "edited": list(clone.edited),
            "can_resume": _has(clone, RESUME_PATCH),
            "patches": {p.patch.name: p.state for p in clone.patches},
        },
        "ambersafe_version": __version__,
    }
