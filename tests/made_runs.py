"""Runs whose metrics are known, for tests of what is drawn and said of them: as folders, without any training."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ambersafe_cli import journal, metrics

CONFIG = "loss: {name: %s, beta: 0.1}\nmodel: {name_or_path: some/model, archive: %s}\n"


def records(stage: str, steps: int, batch: int = 16, attempt: int = 1, first: int = 1) -> list[metrics.Record]:
    """What a healthy run logs: a record for each step, with an evaluation before the first and about eight more."""
    found = []
    for number in range(first, first + steps):
        share = number / (first + steps)
        values = {"loss/train": 2 - share, "grad_norm": 5.0, "examples_per_second": 30.0, "learning_rate": 5e-7}
        if stage == "dpo":
            values |= {"rewards_train/chosen": -share, "rewards_train/rejected": -3 * share}
            values |= {"rewards_train/margins": 2 * share, "rewards_train/accuracies": 0.5 + share / 2}
            values |= {"logps_train/chosen": -100 - share, "logps_train/rejected": -120 - 3 * share}
        moment = 1.7e9 + number
        if number == 1 or number % max(1, steps // 8) == 0:
            held_out = {k.replace("_train/", "_eval/").replace("/train", "/eval"): v for k, v in values.items()}
            held_out = {key: value for key, value in held_out.items() if "eval" in key}
            before = (number - 1) * batch
            found.append(metrics.Record("eval", before, held_out, attempt, moment))
        found.append(metrics.Record("train", number * batch, values, attempt, moment))
    return found


def by_hand(folder: Path, stage: str, entries: Iterable[metrics.Record] = (), archive: object = "null") -> Path:
    """The folder of a run that upstream made by hand, with metrics.jsonl if there are entries."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG % (stage, archive))
    if lines := [journal.to_line(each) for each in entries]:
        (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def recorded(folder: Path, stage: str, entries: Iterable[metrics.Record] = (), **more: Any) -> Path:
    """The folder of a run with a run.json that holds what its readers need, and `more`."""
    by_hand(folder, stage, entries)
    record = {
        "schema": 1,
        "stage": stage,
        "status": "finished",
        "started": "2026-11-24T00:00:00+00:00",
        "ended": "2026-11-24T01:00:00+00:00",
        "attempts": [{"started": "2026-11-24T00:00:00+00:00", "ended": "2026-11-24T01:00:00+00:00", "exit_status": 0}],
        "command": ["python", "train.py", "lr=1e-6"],
        "next_command": ["ambersafe", "show"],
        "environment": {},
        "model": {"name": "some/model", "revision": None, "commit": "a" * 40},
        "data": {"name": "some/data", "revision": None, "commit": "b" * 40},
        "upstream": {"folder": "/clone", "head": "c" * 40, "edited": [], "can_resume": True},
        **more,
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def as_log(entries: Iterable[metrics.Record]) -> str:
    """The lines of train.log by which train.py says the same."""
    kinds = {"train": "train stats after {} examples: {}", "eval": "eval after {}: {}"}
    shown = ((each, {key: f"{value:.5g}" for key, value in each.values.items()}) for each in entries)
    return "".join(kinds[each.kind].format(each.examples, values) + "\n" for each, values in shown)


NAN = math.nan
