"""The command `scripts/gpu-check`: which parts run, how long each may take, and the table at the end."""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_check import table

SCRIPTS = Path(__file__).resolve().parents[1]

LIMITS: Mapping[str, int] = {
    "ceilings": 25, "commands": 175, "attention": 45, "step": 45, "loop": 65, "adapters": 70, "sharding": 40,
    "rewards": 25, "trl": 80,
}  # fmt: skip
"""The parts in their order, and the seconds that each may take on a card, 570 in all. What comes before the first one,
installing and the clone, is taken off those of the last ones."""

WARM_UP = """
import json, torch, transformers, datasets, peft, accelerate
there = torch.cuda.is_available()
torch.zeros(1, device="cuda" if there else "cpu")
print(json.dumps({"card": torch.cuda.get_device_name() if there else None, "torch": torch.__version__}))
"""
"""Reads what all parts import into the machine's memory, and says on what they run."""

ON_CPU = 4
"""How many times as long a part may take with --cpu, where other work may be on the cores."""


def names(text: str) -> list[str]:
    found = text.split(",")
    if unknown := set(found) - set(LIMITS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    return found


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Prove this project on the card of this machine: nine parts, at most ten minutes, one table at the end."
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=about)
    parser.add_argument("--only", type=names, metavar="PART,PART", help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--skip", type=names, metavar="PART,PART", default=[])
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for JSON and logs (default: a new one, named at the end)"
    )
    parser.add_argument("--cpu", action="store_true", help="the same parts at toy size, without a card")
    parser.add_argument("--clone", type=Path, help="what `ambersafe setup --dir` made, or will make here")
    parser.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="what --collect made")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="prepare FOLDER for a machine without a network")
    parser.add_argument(
        "--have", type=Path, metavar="FREEZE.txt", help="of that machine: `{ python3 -V; python3 -m pip freeze; }`"
    )
    given = parser.parse_args(arguments)
    if bool(given.collect) != bool(given.have):
        parser.error("--collect and --have go together")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 if every verdict is ok or not run, 1 if one is not."""
    given = read_arguments(arguments)
    try:
        return act(given)
    except Exception as error:
        # That of AmberSafeError, which cannot be imported before the wheels are there.
        status = getattr(error, "exit_status", None)
        if status is None:
            raise
        print(f"error: {error} {getattr(error, 'hint', '')}".rstrip(), file=sys.stderr)
        return int(status)


def act(given: argparse.Namespace) -> int:
    if given.collect:
        from gpu_check import collect

        collect.collect(given.collect, given.have)
        return 0
    # Or what it has started would go on.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = (given.out or Path(tempfile.mkdtemp(prefix="gpu-check-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.source:
        return run_from(given.source.resolve(), out, given)
    return check(given, out)


def run_from(source: Path, out: Path, given: argparse.Namespace) -> int:
    """Install the wheels that were collected, and go on as a process that finds them, and upstream in its bundle."""
    from gpu_check import collect as collecting

    site = out / "site"
    collecting.install(source, site, sys.executable)
    environment = {**os.environ, **collecting.environment(source), BEGUN: str(time.time())}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    words = [*(["--only", ",".join(given.only)] if given.only else []), *(["--cpu"] if given.cpu else [])]
    words += [*(["--skip", ",".join(given.skip)] if given.skip else []), "--out", str(out)]
    words += ["--clone", str(given.clone)] if given.clone else []
    # In place of this process, so that signals reach the one that has started the parts.
    os.execve(sys.executable, [sys.executable, str(SCRIPTS / "gpu-check"), *words], environment)  # noqa: S606


BEGUN = "GPU_CHECK_BEGUN"


def prepare(given: argparse.Namespace, clone: Path) -> tuple[int, dict[str, str | None]]:
    """Make the clone and warm up; 0, and the card and PyTorch's version, or another status and nothing."""
    setup = [sys.executable, "-m", "ambersafe_cli", "setup", "--dir", str(clone)]
    if (status := subprocess.run(setup, stdout=subprocess.DEVNULL, check=False).returncode) != 0:
        hint = "Is ambersafe-cli installed there? --clone names a clone that is patched, --from brings both."
        print(f"error: `{' '.join(setup)}` failed. {hint}", file=sys.stderr)
        return status, {}
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if given.cpu else {})}
    warm = subprocess.run([sys.executable, "-c", WARM_UP], env=environment, capture_output=True, text=True, check=False)
    if warm.returncode:
        last = (warm.stderr.strip().splitlines() or ["nothing"])[-1]
        print(f"error: {sys.executable} cannot train: {last}. Install ambersafe-cli[train] there.", file=sys.stderr)
        return 1, {}
    found: dict[str, str | None] = json.loads(warm.stdout.splitlines()[-1])
    if found["card"] is None and not given.cpu:
        print(f"error: PyTorch {found['torch']} sees no card here. --cpu runs the parts without one.", file=sys.stderr)
        return 1, {}
    return 0, found


def check(given: argparse.Namespace, out: Path) -> int:
    from gpu_check import table

    begun = float(os.environ.get(BEGUN, time.time()))
    clone = (given.clone or out / "clone").resolve()
    status, where = prepare(given, clone)
    if status:
        return status
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    chosen = [name for name in LIMITS if name not in given.skip and (not given.only or name in given.only)]
    ended: list[table.Ended] = []
    try:
        for name in chosen:
            left = sum(LIMITS.values()) * (ON_CPU if given.cpu else 1) - (time.time() - begun)
            print(f"{name}:", flush=True)
            ended.append(run_part(name, out, clone, given.cpu, left))
            print(f"  {ended[-1].problem or 'ended'} after {ended[-1].seconds:.0f} s", flush=True)
    finally:  # whatever ends it, what was found is not lost
        rows = [row for each in ended for row in table.rows_of(each, on_gpu=not given.cpu)]
        about = {"date": date, **where}
        text = json.dumps(table.document(ended, rows, about), indent=1)
        (out / "results.json").write_text(text + "\n", encoding="utf-8")
        what = f"{where['card'] or 'a CPU'}, PyTorch {where['torch']}, {date}, {time.time() - begun:.0f} s"
        print(f"\n{out}\n{what}\n\n{table.show(rows)}", flush=True)
    return 0 if all(row.verdict in ("ok", "not run") for row in rows) else 1


def run_part(name: str, out: Path, clone: Path, on_cpu: bool, left: float) -> "table.Ended":
    """Run a part in a process of its own until it ends, its time is up or what is left of all time is; what it prints
    is shown and kept."""
    from ambersafe_cli.environment import settings_for_gpus
    from gpu_check import table

    limit = max(1, min(LIMITS[name] * (ON_CPU if on_cpu else 1), left))
    found = out / f"{name}.jsonl"
    found.unlink(missing_ok=True)
    words = [name, "--out", str(out), "--clone", str(clone), *(["--cpu"] if on_cpu else [])]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else settings_for_gpus())}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH"))))
    begun = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "gpu_check.part", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    last = ""
    with ended_after(child, limit) as is_late, (out / f"{name}.log").open("w", encoding="utf-8") as log:
        for line in child.stdout or ():
            log.write(line)
            last = line.strip() or last
            print(line, end="", flush=True)
        status = child.wait()
    problem = f"its {limit:.0f} s are over" if is_late.is_set() else f"ended with {status}: {last}" if status else ""
    return table.Ended(name, table.read(found), problem, time.monotonic() - begun)


@contextmanager
def ended_after(child: "subprocess.Popen[str]", seconds: float) -> Iterator[threading.Event]:
    """Kill a child and what it has started when its time is up, which the event says, or when this process leaves."""
    is_late = threading.Event()

    def kill() -> None:
        is_late.set()
        os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
