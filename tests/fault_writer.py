"""Saves checkpoints with the patched trainers.py, in forks that its parent has killed. Imports torch once.

Reads one JSON object a line, {"run": FOLDER, "first": N, "kill_after": SECONDS or null, "aim": BOOLEAN, "keep": N,
"best": NAME or null, "limit": BYTES or null}, and answers each with one line: the steps that a fork saved, as it said
itself when each save had come back, and the error that ended it.

    python tests/fault_writer.py CLONE
"""

import json
import os
import resource
import signal
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
import trainers

FILES = 4  # of a checkpoint


def trainer(run: str, keep: int | None, best: str | None) -> trainers.BasicTrainer:
    """One whose save() works, without a model, data or a config."""
    torch.manual_seed(0)
    made = object.__new__(trainers.BasicTrainer)
    made.run_dir = run
    made.rank = 0
    made.config = types.SimpleNamespace(keep_checkpoints=keep, keep_best=best, lora=False)
    made.policy = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 32))
    made.optimizer = torch.optim.RMSprop(made.policy.parameters(), lr=0.01)
    made.scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda step: 1.0)
    made.policy(torch.ones(1, 64)).sum().backward()
    made.optimizer.step()
    return made


def save_for_ever(order: dict, said: int) -> None:
    """Save step after step, and each fourth one twice; say each step that was saved."""
    if order["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], resource.RLIM_INFINITY))
    made = trainer(order["run"], order["keep"], order["best"])
    step = order["first"]
    while True:
        made.example_counter = step
        for _ in range(2 if step % 4 == 0 else 1):
            # one in three is the best so far
            metrics = {"loss/eval": 1.0 / step if step % 3 == 0 else 2.0}
            made.save(f"{order['run']}/step-{step}", metrics)
            os.write(said, f"{step}\n".encode())
        step += 1
        if order["kill_after"] is None:
            return


def files(run: str) -> list[int]:
    """How many files each checkpoint has that has its name."""
    return [len(list(path.iterdir())) for path in Path(run).glob("step-*") if path.name[5:].isdecimal()]


def wait_for_a_deletion(run: str) -> None:
    """Wait until a checkpoint is being deleted, or has just gone. That is short: a random moment seldom hits it."""
    before: list[int] = []
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            now = files(run)
        except OSError:
            return
        if len(now) < len(before) or any(number < FILES for number in now):
            return
        before = now


def follow(order: dict) -> dict:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            save_for_ever(order, writing)
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".replace("\n", " ").encode()[:300])
        os._exit(0)
    os.close(writing)
    if order["kill_after"] is not None:
        time.sleep(order["kill_after"])
        if order["aim"]:
            wait_for_a_deletion(order["run"])
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as file:
        lines = file.read().splitlines()
    return {
        "saved": [int(line) for line in lines if line.isdecimal()],
        "error": "".join(lines[-1:]) if lines and not lines[-1].isdecimal() else "",
    }


trainers.rank0_print = lambda *a, **k: None
torch.set_num_threads(1)
for line in sys.stdin:
    print(json.dumps(follow(json.loads(line))), flush=True)
