#!/usr/bin/env python3
"""Training: pinned upstream with only the mends it needs to start, this project, and TRL, in turn at equal settings.

    scripts/bench train --stage dpo --size 7M                       # one pass over the rows
    scripts/bench train --stage dpo --size 7M --epochs 3            # three, as AmberSafe had them
    scripts/bench train --stage dpo --size 60M --only upstream,ambersafe --also 'sorted:cache_reference=false,…'

All train in float32 on the same rows, whose lengths are like PKU-SafeRLHF's, with AmberSafe's batches (SFT 64 in 2
microbatches, DPO 32 in 4) and settings; the reference model is float32 too. Printed are medians over the repeats and
the ratios of runs that came after one another:

    examples/s   from "Creating trainer" to the last step: data, tokenizing and the pass of the reference model included
    tokens/s     the same in real tokens, without padding
    steps/s      from the first step to the last
    peak         the largest resident set of the process that trains, and without what its imports take
    first step   from the command to the end of the first step; this project's preflight is part of it

`--also NAME:KEY=VALUE,…` adds this project with other settings, `--show-losses` puts the metrics of steps beside each
other. TRL lives in an environment of its own, .venv-trl, which is made if `--trl-python` names none.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import training_inputs
from bench_overhead import AMBERSAFE

from ambersafe_cli import metrics, patches

ROOT = Path(__file__).resolve().parent.parent
TRL = "1.16.0"
MENDED_BY = "Train on the CPU where there is no GPU"  # the last of the patches without which upstream does not start
BATCH = {"sft": (64, 2, 2e-7), "dpo": (32, 4, 5e-7)}
"""Of each stage the examples of a step, the microbatches that it is cut into, and the learning rate."""
NOT_EQUAL = (
    "TRL's SFT loss is the mean over tokens, upstream's the sum over a response: as many operations, another gradient",
    "TRL shuffles in an order of its own, so its microbatches hold other rows of the same set",
    "TRL's RMSprop is transformers' \"rmsprop\", with torch's own defaults as upstream's has them",
    "TRL pads to a multiple of its own choosing (pad_to_multiple_of=auto) and drops nothing",
)


@dataclass(frozen=True)
class Job:
    """What is trained: the stage, the folder of training_inputs.py, and for how long."""

    stage: str
    inputs: Path
    pairs: int
    epochs: int

    @property
    def examples(self) -> int:
        return self.pairs * self.epochs


@dataclass(frozen=True)
class Measured:
    """One run. Times in seconds since the command was started; `steps` those of its `train stats` lines, each with how
    many examples had been trained on; `peak` in bytes."""

    begun: float
    steps: tuple[tuple[float, int], ...]
    wall: float
    peak: int
    lines: tuple[str, ...]

    @property
    def examples_per_second(self) -> float:
        return self.steps[-1][1] / (self.steps[-1][0] - self.begun)

    @property
    def steps_per_second(self) -> float:
        return (len(self.steps) - 1) / (self.steps[-1][0] - self.steps[0][0])

    @property
    def first_step(self) -> float:
        return self.steps[0][0]


def read_lines(lines: Iterable[tuple[float, str]]) -> tuple[float, tuple[tuple[float, int], ...], tuple[str, ...]]:
    """When the trainer was made, when each step was said, and the lines of steps, of lines with their times."""
    begun, steps, said = 0.0, [], []
    for moment, line in lines:
        if line.startswith("Creating trainer"):
            begun = moment
        elif found := re.match(r"train stats after (\d+) examples", line):
            steps.append((moment, int(found[1])))
            said.append(line)
    return begun, tuple(steps), tuple(said)


def measure(command: Sequence[str], work: Path, environment: Mapping[str, str]) -> Measured:
    """Run a command to its end. Raises SystemExit with the end of its output if it fails."""
    work.mkdir(parents=True)
    started = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=work, env={**os.environ, **environment}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    peaks: dict[int, int] = {}
    sampler = threading.Thread(target=_sample, args=(child, peaks), daemon=True)
    sampler.start()
    assert child.stdout  # noqa: S101
    output = [(time.perf_counter() - started, line) for line in child.stdout]
    status = child.wait()
    sampler.join()
    begun, steps, said = read_lines(output)
    if status or len(steps) < 2:
        tail = "".join(line for _, line in output[-30:])
        raise SystemExit(f"{tail}\nexit status {status}, {len(steps)} steps: {shlex.join(command)}")
    return Measured(begun, steps, output[-1][0], max(peaks.values()), said)


def _sample(child: "subprocess.Popen[str]", peaks: dict[int, int]) -> None:
    """Note the largest resident set, in bytes, of the process and all below it (Linux)."""
    while child.poll() is None:
        for process in _tree(child.pid):
            try:
                status = Path(f"/proc/{process}/status").read_text()
            except OSError:
                continue
            peaks[process] = max(peaks.get(process, 0), _largest_resident_set(status))
        time.sleep(0.1)


def _tree(process: int) -> list[int]:
    try:
        below = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(each for child in below for each in _tree(int(child)))]


def imports_take(python: str) -> int:
    """The resident set of an interpreter that has imported what trains, in bytes."""
    code = "import torch, transformers, datasets; print(open('/proc/self/status').read())"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return _largest_resident_set(done.stdout)


def _largest_resident_set(status: str) -> int:
    """In bytes, of the text of a /proc/PID/status; 0 if it says nothing, as of a process that has ended."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def settings_of(job: Job) -> list[str]:
    """Upstream's keys that both commands are given."""
    return [
        "n_epochs=" + str(job.epochs), "eval_every=1000000", "eval_batch_size=32", "n_eval_examples=32",
        "do_first_eval=false", "model.reference_dtype=float32", "minimum_log_interval_secs=0",
    ]  # fmt: skip


def upstream_command(job: Job, clone: Path, work: Path) -> list[str]:
    batch, microbatches, rate = BATCH[job.stage]
    dpo = ["loss.beta=0.1", f"model.archive={job.inputs / 'policy.pt'}"] if job.stage == "dpo" else []
    return [
        sys.executable, str(clone / "train.py"), "model=blank_model", f"model.name_or_path={job.inputs / 'model'}",
        "model.block_name=LlamaDecoderLayer", "datasets=[saferlhf]", f"loss={job.stage}", *dpo, "exp_name=upstream",
        "max_length=512", "max_prompt_length=256", f"batch_size={batch}", f"gradient_accumulation_steps={microbatches}",
        f"lr={rate}", "sample_during_eval=false", "wandb.enabled=false", "trainer=BasicTrainer",
        f"local_run_dir={work}", f"hydra.run.dir={work / 'hydra'}", *settings_of(job),
    ]  # fmt: skip


def ambersafe_command(job: Job, clone: Path, more: Sequence[str]) -> list[str]:
    dpo = ["--archive", str(job.inputs / "policy.pt")] if job.stage == "dpo" else []
    return [
        *AMBERSAFE, job.stage, "--dir", str(clone), "--model", str(job.inputs / "model"), "--trainer", "BasicTrainer",
        "--data", str(job.inputs / "rows"), *dpo, "--plain", "do_final_eval=false", *settings_of(job), *more,
    ]  # fmt: skip


def trl_command(job: Job, python: str, work: Path) -> list[str]:
    batch, microbatches, rate = BATCH[job.stage]
    given = {
        "stage": job.stage, "model": str(job.inputs / "model"), "rows": str(job.inputs / "rows" / "train.jsonl"),
        "output": str(work / "output"), "batch_size": batch, "microbatches": microbatches, "lr": rate,
        "epochs": job.epochs, "precompute": job.epochs > 1,
    }  # fmt: skip
    return [python, str(ROOT / "scripts" / "train_with_trl.py"), json.dumps(given)]


def make_trl_environment() -> str:
    """The interpreter of .venv-trl, which is made if it is not there."""
    folder = ROOT / ".venv-trl"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        constraints = str(ROOT / "scripts" / "constraints.txt")
        install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", constraints, "torch", f"trl=={TRL}"]
        subprocess.run(install, check=True)
    return str(python)


def make_clones(work: Path) -> tuple[Path, Path]:
    """Upstream with the patches up to MENDED_BY alone, and with all of them."""
    whole, mended = work / "clone", work / "mended"
    subprocess.run([*AMBERSAFE, "setup", "--dir", str(whole)], check=True, capture_output=True)
    (commit,) = (patch.commit for patch in patches.read_series() if patch.subject == MENDED_BY)
    command = ["git", "-C", str(whole), "worktree", "add", "--quiet", "--detach", str(mended), commit]
    subprocess.run(command, check=True)
    return mended, whole


def mean_tokens(rows: Path, stage: str) -> float:
    """Of an example, with the EOS of each response and without padding; words are tokens here."""
    total, count = 0, 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt, first, second = (len(row[key].split()) for key in ("prompt", "response_0", "response_1"))
        chosen = first if row["is_response_0_safe"] else second
        total += prompt + chosen + 1 if stage == "sft" else 2 * prompt + first + second + 2
        count += 1
    return total / count


def table(
    runs: Mapping[str, Sequence[Measured]], tokens: float, imports: Mapping[str, int]
) -> list[tuple[str, Mapping[str, Sequence[float]]]]:
    """The figures by name, and of each its values by variant, one for each repeat."""

    def each(figure: Callable[[str, Measured], float]) -> dict[str, list[float]]:
        return {name: [figure(name, run) for run in several] for name, several in runs.items()}

    return [
        ("examples/s", each(lambda _, run: run.examples_per_second)),
        ("tokens/s", each(lambda _, run: run.examples_per_second * tokens)),
        ("steps/s", each(lambda _, run: run.steps_per_second)),
        ("peak, MB", each(lambda _, run: run.peak / 1e6)),
        ("peak without imports, MB", each(lambda name, run: (run.peak - imports[name]) / 1e6)),
        ("first step, s", each(lambda _, run: run.first_step)),
        ("command to its end, s", each(lambda _, run: run.wall)),
    ]


def spread(values: Sequence[float]) -> str:
    """The median, and how far the values lie apart."""
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of each run to the one of the other variant in the same round."""
    return [one / other for one, other in zip(values, others, strict=True)]


def show(figures: Sequence[tuple[str, Mapping[str, Sequence[float]]]]) -> None:
    for name, values in figures:
        print(f"\n{name}")
        for variant, several in values.items():
            against = [
                f"{spread(ratios(several, values[other]))} of {other}"
                for other in ("upstream", "trl")
                if other in values and other != variant
            ]
            print(f"  {variant:12} {spread(several):28} {'; '.join(against)}")


def show_losses(runs: Mapping[str, Sequence[Measured]], steps: int = 8) -> None:
    """The metrics of the first steps of upstream beside those of each variant that has them."""
    theirs = [metrics.parse_line(line) for line in runs["upstream"][0].lines]
    for name, (first, *_) in runs.items():
        if name in ("upstream", "trl"):
            continue
        print(f"\n{name}: loss and gradient norm, upstream's first")
        same = {"loss/train": 0, "grad_norm": 0}
        for number, (one, line) in enumerate(zip(theirs, first.lines, strict=True)):
            other = metrics.parse_line(line)
            if not isinstance(one, metrics.Record) or not isinstance(other, metrics.Record):
                raise SystemExit(f"no metrics: {line}")
            for key in same:
                same[key] += one.values[key] == other.values[key]
            if number < steps:
                print("  " + "   ".join(f"{one.values[key]:<9.5g} {other.values[key]:<9.5g}" for key in same))
        print(
            f"  equal to every printed digit, of {len(theirs)} steps: " + ", ".join(f"{k} {n}" for k, n in same.items())
        )


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    version = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], check=True, capture_output=True, text=True
    ).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    return f"{model[1] if model else platform.machine()}, {cores} cores, torch {version}, {datetime.date.today()}"


def also(text: str) -> tuple[str, list[str]]:
    name, colon, settings = text.partition(":")
    if not name or not colon:
        raise argparse.ArgumentTypeError("it takes NAME:KEY=VALUE,KEY=VALUE")
    return name, [each for each in settings.split(",") if each]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("sft", "dpo"), default="dpo")
    parser.add_argument("--size", choices=tuple(training_inputs.SHAPES), default="7M")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps an epoch")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="upstream,ambersafe,trl")
    parser.add_argument("--also", type=also, action="append", default=[], metavar="NAME:KEY=VALUE,…")
    parser.add_argument("--trl-python")
    parser.add_argument("--show-losses", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    variants = [*given.only.split(","), *(name for name, _ in given.also)]
    trl_python = (given.trl_python or make_trl_environment()) if "trl" in variants else ""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        mended, whole = make_clones(work)
        job = Job(given.stage, work / "inputs", given.steps * BATCH[given.stage][0], given.epochs)
        make = [sys.executable, training_inputs.__file__, str(job.inputs), given.size, str(job.pairs)]
        subprocess.run(make, check=True, capture_output=True)
        print(f"{machine()}\n{given.stage} {given.size}: {job.pairs} pairs, {job.epochs} epochs, {given.repeat} rounds")
        cores = str(len(os.sched_getaffinity(0)))
        environment = {"SAFERLHF_DATASET": str(job.inputs / "rows"), "OMP_NUM_THREADS": cores, "PYTHONUNBUFFERED": "1"}
        settings = {"ambersafe": list[str](), **dict(given.also)}

        def once(name: str, place: Path) -> Measured:
            if name == "upstream":
                return measure(upstream_command(job, mended, place), place, environment)
            if name == "trl":
                return measure(trl_command(job, trl_python, place), place, environment)
            return measure(ambersafe_command(job, whole, settings[name]), place, environment)

        runs: dict[str, list[Measured]] = {name: [] for name in variants}
        for number in range(given.repeat):
            for name in variants if number % 2 == 0 else reversed(variants):
                runs[name].append(once(name, work / f"{name}_{number}"))
        own = imports_take(sys.executable)
        imports = {name: imports_take(trl_python) if name == "trl" else own for name in variants}
        figures = table(runs, mean_tokens(job.inputs / "rows" / "train.jsonl", job.stage), imports)
        show(figures)
        if given.show_losses:
            show_losses(runs)
        if "trl" in variants:
            print("\nnot equal:\n  " + "\n  ".join(NOT_EQUAL))
        if given.json:
            given.json.write_text(json.dumps(dict(figures), indent=2) + "\n")


if __name__ == "__main__":
    main()
