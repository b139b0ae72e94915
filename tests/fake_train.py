"""Stands in for upstream's train.py in tests of the launcher: it writes down how it was called, and does what FAKE says."""

import json
import os
import signal
import subprocess
import sys
import time

from hydra.core.override_parser.overrides_parser import OverridesParser


def read(overrides):
    """Every KEY=VALUE as Hydra reads it."""
    return {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)}


def save(run_folder):
    os.makedirs(os.path.join(run_folder, "LATEST"))
    with open(os.path.join(run_folder, "LATEST", "policy.pt"), "w") as file:
        file.write("weights")


config = read(sys.argv[1:])
config = {key: value if isinstance(value, (int, float, list)) or value is None else str(value) for key, value in config.items()}
with open(os.path.join(config["local_run_dir"], "called.json"), "w") as file:
    names = ("SAFERLHF_DATASET", "SAFERLHF_REVISION", "LOGNAME", "WORLD_SIZE")
    json.dump({"config": config, "environment": {n: os.environ.get(n) for n in names}}, file)

match os.environ.get("FAKE", "train"):
    case "train":
        print("resolved model m to revision " + "a" * 40)
        print("resolved dataset d to revision " + "b" * 40)
        print("eval after 0: {'loss/eval': '2.5'}")
        print("train stats after 16 examples: {'loss/train': '2', 'examples_per_second': '3.5'}")
        print("a bar\rthe same bar", end="", file=sys.stderr)
        print("eval after 16: {'loss/eval': '1.25'}")
        save(config["local_run_dir"])
    case "crash":
        print("the reason of the crash", file=sys.stderr)
        sys.exit(3)
    case "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    case "nothing":
        print("starting 0 processes")
    case "hang":
        # A worker in a session of its own, as torchrun starts them, and both of them deaf to SIGTERM.
        worker = subprocess.Popen(
            [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"],
            start_new_session=True,
        )
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"started {worker.pid}", flush=True)
        time.sleep(600)
