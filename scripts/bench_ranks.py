#!/usr/bin/env python3
"""What more ranks bring and take on this machine: speed, memory and traffic of SFT (Linux, on the CPU with gloo).

    scripts/bench_ranks.py speed   [--size 60M] [--steps 3] [--repeat 3]   # 2 ranks on 2 cores by 1 rank on 1 core
    scripts/bench_ranks.py memory  [--size 500MB] [--ranks 4]              # of all ranks together, by that of one
    scripts/bench_ranks.py traffic [--size 60M] [--ranks 2]                # bytes that a rank sends in a step

All run `ambersafe sft --nproc N` on the rows of bench_data.py, one thread a rank, with AmberSafe's batch of 64 in
2 microbatches (memory: --batch in --grad-accum). Cores are pinned by sched_setaffinity(2). Memory is the sum over ranks
of the proportional set size, in which a page that several share counts once, at its peak; that of as many processes
which have imported the same modules is subtracted. Traffic is what the loopback interface has sent between two steps.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_data
import bench_runs

from ambersafe_cli import patches, upstream

AMBERSAFE = (sys.executable, "-m", "ambersafe_cli")
SHAPES = {**bench_data.SHAPES, "500MB": bench_data.Shape(1024, 10, 8, 2389, 1024)}
IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
import hydra, torch, trainers, transformers
import transformers.models.llama.modeling_llama, torch.distributed.fsdp, torch.distributed.checkpoint.state_dict
print("ready", flush=True)
sys.stdin.read()
"""


def sample(every: float, look: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Call `look` again and again while the block runs."""

    @contextlib.contextmanager
    def sampling() -> Iterator[None]:
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(every):
                look()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    return sampling()


def ranks_of(folder: Path) -> list[int]:
    """The processes that run train.py for a run below the folder, torchrun itself left away."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if any(word.endswith(b"train.py") for word in words) and b"torch.distributed.run" not in words:
                found += [int(path.parent.name)] if any(os.fsencode(folder) in word for word in words) else []
    return found


def proportional(process: int) -> int:
    """The proportional set size of a process in bytes; 0 if it is no more."""
    with contextlib.suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


def sent() -> int:
    """Bytes that the loopback interface has sent so far."""
    found = re.search(r"^\s*lo:\s*(.*)$", Path("/proc/net/dev").read_text(), re.MULTILINE)
    return int(found[1].split()[8]) if found else 0


def train(task: Path, clone: Path, ranks: int, batch: int, microbatches: int, *settings: str) -> bench_runs.Run:
    """One run in a folder of its own below `task`, which holds model and data."""
    folder = Path(tempfile.mkdtemp(dir=task, prefix="run_"))
    command = [
        *(*AMBERSAFE, "sft", "--plain", "--no-preflight", "--recipe", "ambersafe", "--nproc", str(ranks)),
        *("--model", str(task / "model"), "--data", str(task / "data"), "--dir", str(clone), "--epochs", "1"),
        *("--batch-size", str(batch), "--grad-accum", str(microbatches), "do_first_eval=false", "eval_batch_size=8"),
        *("n_eval_examples=8", "do_final_eval=false", "minimum_log_interval_secs=0", *settings),
    ]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(task / "datasets")}
    return bench_runs.run(command, folder, environment)


def speed(given: argparse.Namespace, task: Path, clone: Path) -> dict[str, object]:
    """Examples a second between the first and the last step, in turn."""
    cores = sorted(os.sched_getaffinity(0))
    found: dict[int, list[float]] = {1: [], given.ranks: []}
    for turn in range(given.repeat):
        order = (1, given.ranks) if turn % 2 == 0 else (given.ranks, 1)
        for ranks in order:
            os.sched_setaffinity(0, cores[:ranks])
            made = bench_runs.steps(train(task, clone, ranks, 64, 2).lines)
            rate = (made[-1].examples - made[0].examples) / (made[-1].time - made[0].time)
            found[ranks].append(rate)
            print(f"{ranks} ranks on {ranks} cores: {rate:.3f} examples/s", file=sys.stderr)
    ratio = bench_runs.ratios(found[given.ranks], found[1])
    print(
        f"{given.ranks} ranks on {given.ranks} cores by 1 rank on 1 core: {ratio.median:.2f} times "
        f"({ratio.least:.2f} to {ratio.greatest:.2f}, {given.repeat} turns)"
    )
    return {"examples/s": found, "ratio": ratio.median}


def imports(clone: Path, count: int) -> int:
    """The proportional set size of so many processes that have only imported, in bytes."""
    command = [sys.executable, "-c", IMPORTS, str(clone)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for child in children:
            if not child.stdout or child.stdout.readline() != b"ready\n":
                raise SystemExit("the imports failed")
        return sum(proportional(child.pid) for child in children)
    finally:
        for child in children:
            child.kill()


def memory(given: argparse.Namespace, task: Path, clone: Path) -> dict[str, object]:
    """Of all ranks together, at the peak of the run, and at the peak until training begins."""
    found: dict[int, dict[str, int]] = {}
    for ranks in (1, given.ranks):
        base = imports(clone, ranks)
        moments: list[tuple[float, list[int]]] = []
        begun = time.perf_counter()

        def look(moments: list[tuple[float, list[int]]] = moments, begun: float = begun) -> None:
            moments.append((time.perf_counter() - begun, [proportional(process) for process in ranks_of(task)]))

        with sample(0.05, look):
            run = train(task, clone, ranks, given.batch, given.grad_accum)
        trains = next(line.time for line in run.lines if line.text.startswith("Using "))
        whole = max(sum(each) for _, each in moments) - base
        loading = max(sum(each) for when, each in moments if when < trains) - base
        largest = max(max(each, default=0) for _, each in moments) - base // ranks
        found[ranks] = {"in all": whole, "until training begins": loading}
        print(
            f"{ranks} ranks: {whole / 1e6:.0f} MB beyond {base / 1e6:.0f} MB of imports, {loading / 1e6:.0f} MB until "
            f"training begins; the largest rank {largest / 1e6:.0f} MB"
        )
    for what, of_one in found[1].items():
        print(f"{given.ranks} ranks by one, {what}: {found[given.ranks][what] / of_one:.2f} times")
    return {"beyond imports, bytes": found}


def traffic(given: argparse.Namespace, task: Path, clone: Path) -> dict[str, object]:
    """What the loopback interface has sent between the lines of two steps."""
    moments: list[tuple[float, int]] = []
    begun = time.perf_counter()
    with sample(0.02, lambda: moments.append((time.perf_counter() - begun, sent()))):
        made = bench_runs.steps(train(task, clone, given.ranks, 64, 2).lines)
    first, last = (min(moments, key=lambda each: abs(each[0] - step.time))[1] for step in (made[0], made[-1]))
    each = (last - first) / (len(made) - 1) / given.ranks
    print(f"{given.ranks} ranks: each sends {each / 1e6:.1f} MB a step, over {len(made) - 1} steps")
    return {"bytes a rank and step": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "traffic"))
    parser.add_argument("--size", choices=SHAPES)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--batch", type=int, default=4, help="of memory: small, so that the model is most of it")
    parser.add_argument("--grad-accum", type=int, default=1, help="of memory")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shape = SHAPES[given.size or ("500MB" if given.what == "memory" else "60M")]
    given.ranks = given.ranks or (4 if given.what == "memory" else 2)
    with tempfile.TemporaryDirectory() as place:
        task = Path(place)
        bench_data.write_data(task / "data", given.steps * (given.batch if given.what == "memory" else 64), shape)
        bench_data.build_model(task, shape)
        (task / "policy.pt").unlink()
        clone = task / "direct-preference-optimization"
        subprocess.run([*AMBERSAFE, "setup", "--dir", str(clone)], check=True, capture_output=True)
        print(f"{upstream.PINNED_COMMIT[:12]} with {len(patches.read_series())} patches, {given.steps} steps")
        found = {"speed": speed, "memory": memory, "traffic": traffic}[given.what](given, task, clone)
        if given.json:
            given.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
