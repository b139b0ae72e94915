"""`ambersafe pipeline`: SFT, and then DPO from it, right here or as two jobs of Slurm, one waiting for the other."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ambersafe_cli import display, preflight, recipe, requests, runs, slurm, stages
from ambersafe_cli.errors import AmberSafeError

_OF_DPO = ("beta", "loss", "label_smoothing")
# What sft and dpo have, and what is for one stage alone: there KEY=VALUE with the stage's name in front is the way.
_NOT_HERE = {
    "batch_size": None, "grad_accum": None, "lr": None, "epochs": None, "exp_name": None, "keep_best": None,
    "archive": None, "nnodes": None, "node_rank": None, "rdzv_endpoint": None, "rdzv_timeout": 600, "detach": False,
}  # fmt: skip


def run(params: Mapping[str, Any]) -> int:
    """Look at both stages first, then train, or queue, the one and the other; return the exit status of the last.

    `params` are those of the command `pipeline` by their names in cli.py. Raises AmberSafeError.
    """
    sft = _request("sft", params)
    first = stages.prepare(sft)
    dpo = replace(_request("dpo", params), archive=runs.checkpoint(first.launch.run_folder), archive_to_come=True)
    second = stages.prepare(dpo)
    if params["dry_run"]:
        stages.show(first, sft)
        stages.show(second, dpo)
        return 0
    if sft.slurm:
        slurm.require()
    reports = [_look(prepared) if sft.preflight else None for prepared in (first, second)]
    if sft.slurm:
        job = stages.queue(first, reports[0], sft)
        try:
            stages.queue(second, reports[1], dpo, after=job)
        except AmberSafeError:
            display.say(f"sft is queued all the same, as job {job}; when it has finished:")
            display.say(shlex.join(first.next_command))
            raise
        return 0
    display.say("--- sft ---")
    status = stages.start(first, reports[0], plain=sft.plain)
    if status:
        folder = first.launch.run_folder
        display.say(f"dpo was not started; when {shlex.join(['ambersafe', 'resume', str(folder)])} has finished:")
        display.say(shlex.join(first.next_command))
        return status
    display.say("--- dpo ---")
    # Only now its folder: it is named after the time.
    return stages.start(stages.prepare(replace(dpo, archive_to_come=False)), reports[1], plain=dpo.plain)


def _look(prepared: stages.Prepared) -> preflight.Report:
    display.say(f"preflight of {prepared.stage.name}")
    report = preflight.check(stages.subject(prepared))
    stages.require(report)
    return report


def _request(stage: recipe.StageName, params: Mapping[str, Any]) -> requests.Request:
    """What `ambersafe sft` or `ambersafe dpo` would have been asked."""
    given = {name: value for name, value in params.items() if stage == "dpo" or name not in _OF_DPO}
    overrides = []
    for text in params["overrides"] or ():
        name, dot, rest = text.partition(".")
        if not dot or name not in ("sft", "dpo"):
            overrides.append(text)
        elif name == stage:
            overrides.append(rest)
    return requests.read(stage, {**_NOT_HERE, **given, "overrides": overrides})
