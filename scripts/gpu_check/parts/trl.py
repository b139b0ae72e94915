"""Tokens a second beside TRL's DPOTrainer, on the same card, model, rows and precision, by `scripts/bench train`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from gpu_check.figures import Report, Setup

BENCH = Path(__file__).resolve().parents[2] / "bench_train.py"


def run(setup: Setup, report: Report) -> None:
    if importlib.util.find_spec("trl") is None:
        report.not_run("", "trl is missing")
        return
    found = setup.folder / "found.json"
    command = [
        *(sys.executable, str(BENCH), "--stage", "dpo", "--only", "ambersafe,trl", "--trl-python", sys.executable),
        *("--clone", str(setup.clone), "--size", "400M" if setup.on_gpu else "7M", "--repeat", "1", "--bf16"),
        *("--steps", str(setup.size(12, 2)), "--json", str(found)),
    ]
    subprocess.run(command, check=True, cwd=setup.folder)
    runs = json.loads(found.read_text())["runs"]
    for name, (one, *_) in runs.items():
        for figure in ("tokens/s", "training, s", "to the first step, s"):
            report.figure(f"{name}, {figure}", one[figure])
    report.figure("tokens/s by TRL's", runs["ambersafe"][0]["tokens/s"] / runs["trl"][0]["tokens/s"], "between steps")
    report.figure("training by TRL's, time", runs["ambersafe"][0]["training, s"] / runs["trl"][0]["training, s"])
