#!/usr/bin/env python3
"""What `ambersafe sft` costs over the same train.py command started by hand: wall time, and its own memory.

    scripts/bench_overhead.py [--repeat 3] [--seconds 120] [--clone DIR]

Both are started in turn on a tiny model, for long enough that a run takes about `--seconds`; the medians and the spread
of the ratio are printed, and the launcher's largest resident set while train.py ran (Linux).
"""

import argparse
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ambersafe_cli import demo

BUILD_MODEL = Path(demo.__file__).parent / "children" / "tiny_model.py"
AMBERSAFE = [sys.executable, "-m", "ambersafe_cli"]


def prepare(work: Path, clone: Path | None) -> Path:
    """Build the tiny model in `work / "model"`, and return the clone, made there if none is given."""
    clone = clone or work / "clone"
    subprocess.run([*AMBERSAFE, "setup", "--dir", str(clone)], check=True, capture_output=True)
    build = [sys.executable, str(BUILD_MODEL), str(work / "model"), str(demo.DATA / "train.jsonl")]
    subprocess.run(build, check=True, capture_output=True)
    return clone


def sft(work: Path, clone: Path, examples: int, *more: str) -> list[str]:
    settings = ["n_epochs=null", f"n_examples={examples}", f"eval_every={examples}", "wandb.enabled=false"]
    model, data = ["--model", str(work / "model")], ["--data", str(demo.DATA)]
    return [*AMBERSAFE, "sft", "--recipe", "tiny", "--dir", str(clone), *model, *data, *more, *settings]


def timed(command: list[str], work: Path) -> tuple[float, float]:
    """Wall time in seconds, and the largest resident set of the process itself in MB."""
    begun = time.perf_counter()
    child = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        try:
            found = re.search(r"^VmHWM:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text(), re.MULTILINE)
            peak = max(peak, int(found[1]) if found else 0)
        except OSError:
            pass
        time.sleep(0.05)
    if child.returncode:
        raise SystemExit(f"exit status {child.returncode}: {shlex.join(command)}")
    return time.perf_counter() - begun, peak / 1024


def by_hand(work: Path, clone: Path, examples: int, number: int) -> list[str]:
    """What --dry-run prints, but for the folder, as an argument list; `env` sets the variables."""
    run = work / f"by_hand_{number}"
    run.mkdir()
    given = sft(work, clone, examples, "--no-preflight", "--dry-run", f"local_run_dir={run}")
    printed = subprocess.run(given, cwd=work, check=True, capture_output=True, text=True).stdout
    return ["env", *shlex.split(printed.partition("&& ")[2])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clone", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        clone = prepare(work, given.clone)
        short, _ = timed(by_hand(work, clone, 160, 0), work)
        longer, _ = timed(by_hand(work, clone, 3200, 1), work)
        examples = 16 * max(1, round((given.seconds - short) / (longer - short) * 3040 / 16))
        print(f"{examples} examples a run, two runs in turn, {given.repeat} times")
        wall: dict[str, list[float]] = {"by hand": [], "ambersafe": []}
        memory = []
        for number in range(given.repeat):
            wall["by hand"].append(timed(by_hand(work, clone, examples, number + 2), work)[0])
            seconds, peak = timed(sft(work, clone, examples, "--no-preflight"), work)
            wall["ambersafe"].append(seconds)
            memory.append(peak)
        ratios = [b / a for a, b in zip(wall["by hand"], wall["ambersafe"], strict=True)]
        for name, values in wall.items():
            print(f"{name:10} {statistics.median(values):7.1f} s (median)")
        print(f"ratio      {statistics.median(ratios):7.4f} (median), {min(ratios):.4f} to {max(ratios):.4f}")
        print(f"memory     {max(memory):7.1f} MB, the launcher's largest resident set")


if __name__ == "__main__":
    main()
