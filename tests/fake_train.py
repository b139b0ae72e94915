"""Stands in for upstream's train.py in tests of the launcher: notes how it was called, and does what FAKE says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # as upstream's patched train.py


def read(overrides):
    """Every KEY=VALUE as Hydra reads it."""
    return {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)}


def save(run_folder):
    (run_folder / "LATEST").mkdir()
    (run_folder / "LATEST" / "policy.pt").write_text("weights")


config = read(sys.argv[1:])
config = {
    key: value if isinstance(value, (int, float, list)) or value is None else str(value)
    for key, value in config.items()
}
run_folder = Path(config["local_run_dir"])
environment = {n: os.environ.get(n) for n in ("SAFERLHF_DATASET", "SAFERLHF_REVISION", "LOGNAME", "WORLD_SIZE")}
(run_folder / "called.json").write_text(json.dumps({"config": config, "environment": environment}))

match os.environ.get("FAKE", "train"):
    case "train":
        print("resolved model m to revision " + "a" * 40)
        print("resolved dataset d to revision " + "b" * 40)
        print("eval after 0: {'loss/eval': '2.5'}")
        print("train stats after 16 examples: {'loss/train': '2', 'examples_per_second': '3.5'}")
        print("a bar\rthe same bar", end="", file=sys.stderr)
        print("eval after 16: {'loss/eval': '1.25'}")
        save(run_folder)
    case "talk":
        for number in range(20_000):
            print(f"line {number} " + "x" * 50)
            print(f"bar {number} " + "x" * 50, end="\r", file=sys.stderr)
        save(run_folder)
    case "steps" | "steps and crash" as what:
        pause = float(os.environ.get("FAKE_PAUSE", "0"))
        print("UserWarning: \x1b[31mcareful\x1b[0m\x1b]0;a title\x07", file=sys.stderr)
        print("eval after 0: {'loss/eval': '0.69315', 'rewards_eval/accuracies': '0', 'rewards_eval/margins': '0'}")
        for number in range(1, 41):
            print(f"Computing eval metrics: {number}%|#| {number}/100", end="\r", file=sys.stderr)
            print(
                f"train stats after {number * 16} examples: {{'rewards_train/chosen': '{number / 100:.5g}', "
                f"'rewards_train/rejected': '{-number / 100:.5g}', 'rewards_train/accuracies': '0.75', "
                f"'rewards_train/margins': '{number / 50:.5g}', 'loss/train': '{0.69315 - number / 100:.5g}', "
                f"'examples_per_second': '16', 'grad_norm': '23.1', 'counters/examples': {number * 16}}}",
                flush=True,
            )
            time.sleep(pause)
        print("train stats after 640 examples: {'loss/train': oops}")
        if what == "steps and crash":
            raise RuntimeError("the reason of the crash")
        print("eval after 640: {'loss/eval': '0.25', 'rewards_eval/accuracies': '0.9', 'rewards_eval/margins': '0.8'}")
        save(run_folder)
    case "crash":
        print("the reason of the crash", file=sys.stderr)
        sys.exit(3)
    case "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    case "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    case "nothing":
        print("starting 0 processes")
    case "wait":
        print("waiting", flush=True)
        time.sleep(600)
    case "slow to stop":

        def stop(*_):
            time.sleep(float(os.environ.get("FAKE_SECONDS", "4")))
            (run_folder / "saved").touch()
            sys.exit(143)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        print("waiting", flush=True)
        time.sleep(600)
    case "finish":  # a signal comes when all is saved
        save(run_folder)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        print("waiting", flush=True)
        time.sleep(600)
    case "hang":
        # A worker in a session of its own, as torchrun starts them, and both of them deaf to SIGTERM.
        worker = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
            ],
            start_new_session=True,
        )
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"started {worker.pid}", flush=True)
        time.sleep(600)
