"""One stage from the command line to a finished run: everything between the flags and the exit status."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ambersafe_cli import (
    __version__,
    attempts,
    control,
    display,
    environment,
    extras,
    launch,
    locks,
    patches,
    planning,
    plans,
    preflight,
    provenance,
    queueing,
    recorded,
    runs,
    slurm,
    tensorboard_files,
    upstream,
)
from ambersafe_cli import recipe as recipes
from ambersafe_cli.errors import ArchiveError, CloneError, PreflightError, UsageError
from ambersafe_cli.files import expand
from ambersafe_cli.requests import Request

SAFERLHF_PATCH = "Add the saferlhf dataset"
RESUME_PATCH = "Go on from a checkpoint"


def run(request: Request) -> int:
    """Do what `ambersafe sft` or `ambersafe dpo` was asked for; return the exit status. Raises AmberSafeError."""
    prepared = prepare(request)
    if request.dry_run:
        show(prepared, request)
        return 0
    report = None
    if request.slurm:
        slurm.require()
    if request.preflight:
        report = preflight.check(subject(prepared))
        require(report)
    if request.slurm:
        queue(prepared, report, request)
        return 0
    return start(prepared, report, request.detach, request.plain)


def queue(prepared: "Prepared", report: preflight.Report | None, request: Request, after: str | None = None) -> str:
    """Hand a prepared stage to Slurm, to begin when the job `after` has ended well; return its job's id.

    Raises SlurmError, RunFolderError.
    """
    assert request.slurm  # noqa: S101, for mypy
    prepared.environment.require_packages()
    _show_notes(prepared)
    launched, name = prepared.launch, str(prepared.stage.get("exp_name"))
    processes = launched.processes // request.slurm.nodes
    flags = _flags_of_resume(prepared)
    return queueing.submit(launched.run_folder, _record(prepared, report), name, request.slurm, processes, flags, after)


def _flags_of_resume(prepared: "Prepared") -> list[str]:
    """What `ambersafe resume` has to be told, besides the run, to go on with it as it was started."""
    python = prepared.environment.python
    flags = [] if recorded.is_this(python) else ["--python", python]
    return [*flags, *(["--allow-modified"] if _allows_modified(prepared) else [])]


def _allows_modified(prepared: "Prepared") -> bool:
    """Whether the run goes on with what a record alone could not ask for, as who starts it has: a clone that is not
    what the series makes, or a KEY=VALUE that does more than setting a value."""
    clone = prepared.clone
    is_of_series = clone.head in patches.known(each.patch for each in clone.patches)
    is_plain = all(recorded.is_setting(override.text) for override in prepared.stage.overrides)
    return prepared.allow_modified or bool(clone.edited) or not is_of_series or not is_plain


def show(prepared: "Prepared", request: Request) -> None:
    """What --dry-run shows: the command, or the batch script."""
    _show_notes(prepared)
    if request.slurm:
        name = str(prepared.stage.get("exp_name"))
        display.write(
            slurm.script(request.slurm, prepared.launch.run_folder, name, _flags_of_resume(prepared)).rstrip("\n")
        )
    else:
        display.write(prepared.launch.as_shell())


def check(request: Request, as_json: bool) -> None:
    """`ambersafe check`: show what preflight finds and what the run would do. Raises PreflightError for an error."""
    prepared = prepare(request)
    report = preflight.check(subject(prepared))
    if as_json:
        display.write_json(asdict(report))
    else:
        _show_notes(prepared)
        if report.plan:
            display.write_facts(plans.describe(report.plan), indent=26)
    require(report)


def subject(prepared: "Prepared", clone_is_checked: bool = False) -> preflight.Subject:
    """What preflight is to look at."""
    return preflight.Subject(
        stage=prepared.stage,
        clone=prepared.clone,
        environment=prepared.environment,
        run_folder=prepared.launch.run_folder,
        processes=prepared.launch.processes,
        expected_base=upstream.PINNED_COMMIT,
        allow_modified=prepared.allow_modified,
        clone_is_checked=clone_is_checked,
        archive_to_come=prepared.archive_to_come,
    )


def require(report: preflight.Report) -> None:
    """Show what was found. Raises PreflightError if an error is among it."""
    for finding in report.findings:
        display.find(finding.level, finding.what, finding.mend)
    if report.errors:
        count = "1 error" if len(report.errors) == 1 else f"{len(report.errors)} errors"
        raise PreflightError(f"Not started: preflight found {count}.", "--no-preflight starts without these checks.")


def start(
    prepared: "Prepared", report: preflight.Report | None = None, detach: bool = False, plain: bool = False
) -> int:
    """Make the run folder and run a prepared stage to its end; return the exit status. Raises AmberSafeError.

    `report` is what preflight found, or None if it was left away: it goes into run.json. `detach` leaves the run to a
    process in the background; `plain` leaves the live view away.
    """
    prepared.environment.require_packages()
    folder = prepared.launch.run_folder
    runs.make(folder)
    _show_notes(prepared)
    if prepared.launch.machines.number > 0:
        if detach:
            raise UsageError("--detach is for machine 0, which keeps the run.", "Leave it away on the others.")
        return attempts.help_out(prepared.launch, folder / "train.log")
    record = _record(prepared, report)
    if detach:
        begun: dict[str, Any] = {"started": runs.now(), "ended": None, "exit_status": None, "attempts": []}
        with locks.locked(folder):
            runs.require_empty(folder)  # another run may have been here since it was made
            runs.write(folder, {**record, **begun, "status": "running"})
        return control.detach(folder, prepared.environment.python, _allows_modified(prepared))
    return attempts.run(prepared.launch, record, plain)


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
    allow_modified: bool
    tensorboard: bool = False
    archive_to_come: bool = False


def prepare(request: Request) -> Prepared:
    """Resolve everything, without starting or writing anything. Raises AmberSafeError."""
    if request.tensorboard:
        extras.require("tensorboard", tensorboard_files.EXTRA)
    chosen = recipes.load(request.recipe)
    stage = recipes.resolve(request.stage, chosen, request.flags, request.overrides)
    provenance.require_no_secret(_settings(chosen, stage))
    provenance.require_no_secret_for_slurm(request.slurm.others if request.slurm else ())
    clone = upstream.inspect(request.clone, patches.read_series())
    if stage.data and not _has(clone, SAFERLHF_PATCH):
        raise CloneError(f"{clone.folder} lacks the patch that adds saferlhf.", "Apply it: `ambersafe setup`.")
    sft_run = None
    if request.stage == "dpo":
        archive, sft_run = _archive(stage, request)
        stage = stage.with_values({"model.archive": str(archive)})
    given = stage.get("local_run_dir")
    folder = expand(str(given)).absolute() if given else runs.folder_for(str(stage.get("exp_name")))
    child = environment.probe(request.python, ask_torch=request.auto or not request.dry_run)
    if request.auto:
        if request.slurm:
            raise UsageError("--auto looks at the GPUs of this machine, not at Slurm's.", planning.ELSEWHERE)
        stage, why = planning.automatic(stage, child, request.processes, request.machines.count)
        display.say(f"--auto takes {why}")
    if request.machines.number > 0:
        folder = folder.with_name(f"{folder.name}_machine-{request.machines.number}")
    processes = request.processes
    if request.slurm:
        # The GPUs are those of other machines. What is recorded is one machine with all processes: the job says which.
        each = processes or request.slurm.gpus_per_node
        if each is None:
            raise UsageError("--slurm needs --gpus-per-node, or --nproc where there are no GPUs.")
        total = each * request.slurm.nodes
        child = replace(child, gpus=("a GPU of Slurm",) * total if request.slurm.gpus_per_node else ())
        is_alone = total == 1 and ("FSDP" not in stage.trainer or launch.needs_basic_trainer(stage))
        processes = None if is_alone and request.processes is None else total
    stage, plan = launch.plan(stage, clone, child, folder, processes, request.machines)
    return Prepared(
        stage, plan, clone, chosen, child, sft_run, _next_command(request, plan), request.allow_modified,
        request.tensorboard, request.archive_to_come,
    )  # fmt: skip


def _next_command(request: Request, plan: launch.Launch) -> list[str]:
    """What to type next: after SFT the DPO stage alike, after DPO what makes a Hugging Face folder."""
    if request.stage == "dpo":
        return ["ambersafe", "export", str(plan.run_folder)]
    return ["ambersafe", "dpo", "--archive", str(runs.checkpoint(plan.run_folder)), *request.carried]


def _has(clone: upstream.CloneState, subject: str) -> bool:
    return any(p.patch.subject == subject and p.state != "missing" for p in clone.patches)


def _archive(stage: recipes.Stage, request: Request) -> tuple[Path, Path | None]:
    """The policy.pt that DPO starts from, and the SFT run that it belongs to if that was found here."""
    given = request.archive or stage.get("model.archive")
    if given:
        path = expand(str(given)).absolute()
        if request.archive_to_come:
            return path, path.parent.parent
        if path.is_dir():
            path = path / "policy.pt" if (path / "policy.pt").is_file() else runs.checkpoint(path)
        if not path.is_file():
            raise ArchiveError(f"There is no checkpoint {path}.", "--archive takes a policy.pt, or a run's folder.")
        record = runs.read_or_warn(path.parent.parent)
        return path, path.parent.parent if record and record["stage"] == "sft" else None
    revision = stage.get("model.revision")
    run = runs.newest_finished_sft(stage.model, str(revision) if revision else None)
    display.say(f"from the newest SFT run of this model: {run}")
    return runs.checkpoint(run), run


def _show_notes(prepared: Prepared) -> None:
    for note in prepared.launch.notes:
        display.warn(note)


def _settings(recipe: recipes.Recipe, stage: recipes.Stage) -> Iterator[tuple[str, object]]:
    """Every key and value that the record of a run of this stage will hold, and those of the recipe's other stage."""
    for values in (*recipe.values.values(), stage.values):
        yield from values.items()
    for override in stage.overrides:
        yield override.key, override.value
        yield override.key, [override.text]
    yield "description", recipe.description


def _record(prepared: Prepared, report: preflight.Report | None) -> dict[str, Any]:
    """What run.json says of a run when it starts."""
    plan, clone, stage = prepared.launch, prepared.clone, prepared.stage
    archive = stage.get("model.archive")
    return {
        "stage": stage.name,
        "model": {"name": stage.model, "revision": stage.get("model.revision"), "commit": None},
        "data": provenance.of_data(stage, report.data if report else None),
        "sft_run": prepared.sft_run and str(prepared.sft_run),
        "archive": archive and str(archive),
        "archive_fingerprint": provenance.of_checkpoint(archive),
        "recipe": asdict(prepared.recipe),
        "values": dict(stage.values),
        "overrides": [override.text for override in stage.overrides],
        "command": list(plan.argv),
        "processes": plan.processes,
        "machines": asdict(plan.machines),
        "environment": dict(plan.environment),
        "variables": provenance.of_variables(),
        "python": provenance.of_python(prepared.environment),
        "machine": provenance.of_machine(),
        "working_folder": str(Path.cwd()),
        "working_folder_git": provenance.of_working_folder(Path.cwd()),
        "planned_examples": report.plan.examples if report and report.plan else None,
        "preflight": provenance.of_findings(report.findings if report else None),
        "allow_modified": prepared.allow_modified,
        "tensorboard": prepared.tensorboard,
        "next_command": prepared.next_command,
        "upstream": provenance.of_clone(clone, can_resume=_has(clone, RESUME_PATCH)),
        "ambersafe_version": __version__,
    }
