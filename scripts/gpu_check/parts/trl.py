"""Tokens a second beside TRL's DPOTrainer, on the same card, model, rows and precision, once each."""

import importlib.util
import statistics
import sys
from functools import partial
from pathlib import Path

import bench_data
import bench_runs
import bench_train

from gpu_check.figures import Report, Setup


def run(setup: Setup, report: Report) -> None:
    if importlib.util.find_spec("trl") is None:
        report.not_run("", "trl is missing")
        return
    shape = bench_data.SHAPES["160M" if setup.on_gpu else "7M"]
    bench_data.build_model(setup.folder, shape)
    stage = bench_train.STAGES["dpo"]
    rows = bench_data.write_data(setup.folder / "data", stage.batch * setup.size(12, 2), shape)
    task = bench_train.Task(stage, setup.folder, setup.folder / "data", 1, bf16=True)
    tokens = statistics.mean(row.dpo_tokens for row in rows)
    report.text("both have", "the settings of PyTorch that ambersafe makes")
    found = {}
    for name, command in (
        ("ambersafe", partial(bench_train.ambersafe_command, setup.clone, ("--no-preflight",))),
        ("trl", partial(bench_train.trl_command, Path(sys.executable), {})),
    ):
        one = bench_train.train(bench_train.Variant(name, command, 0.0, ""), task)
        found[name] = bench_runs.figures(one, tokens, 0.0)
        for figure in ("tokens/s", "training, s", "to the first step, s"):
            report.figure(f"{name}, {figure}", found[name][figure])
    report.figure("tokens/s by TRL's", found["ambersafe"]["tokens/s"] / found["trl"]["tokens/s"], "between steps")
    report.figure("training by TRL's, time", found["ambersafe"]["training, s"] / found["trl"]["training, s"])
