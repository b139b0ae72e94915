#!/usr/bin/env python3
"""Training speed and memory of upstream, of this project and of TRL, in turn on the same rows.

    scripts/bench train [--stage dpo] [--size 7M] [--repeat 3] [--steps N | --epochs N --examples M] [--json FILE]
    scripts/bench train --only upstream,ambersafe --set KEY=VALUE --also NAME:KEY=VALUE,KEY=VALUE --show-losses

`upstream` is the pinned commit with only the mends that it needs to start, by hand; `ambersafe` is what the command of
that name does; `trl` is TRL's trainer at settings as equal as can be, and what is not equal is printed. All work in
float32 on a LLaMA with random weights and rows of random words, with one thread for each core. Without `--steps` and
`--epochs` there are as many steps as upstream makes in about a minute. See scripts/README.md.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_data
import bench_runs

from ambersafe_cli import patches, worktrees

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
AMBERSAFE = [sys.executable, "-m", "ambersafe_cli"]
TRL = "trl==1.16.0"
NAMES = ("upstream", "ambersafe", "trl")
LAST_MEND = "0004-"  # the last patch that upstream needs to start on a CPU
STEPS_TO_CALIBRATE = 4
STEPS_SHOWN = 5
THREADS = len(os.sched_getaffinity(0))
# Prints what imports hold resident, in kB, and versions.
PROBE = """
import json, re, torch, transformers, datasets
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(json.dumps([int(peak), device, f"torch {torch.__version__}, transformers {transformers.__version__}"]))
"""
# Prints how many operations a second a product of two square matrices reaches: the best of five, after two to warm up.
MATRIX_RATE = """
import sys, time, torch
cuda = torch.cuda.is_available()
n, times = (8192, 20) if cuda else (2048, 2)
a, b = (torch.randn(n, n, device="cuda" if cuda else "cpu").to(getattr(torch, sys.argv[1])) for _ in range(2))
torch.backends.cuda.matmul.allow_tf32 = True
best = 0.0
for turn in range(7):
    begun = time.perf_counter()
    for _ in range(times):
        a @ b
    if cuda:
        torch.cuda.synchronize()
    best = max(best, 2 * n**3 * times / (time.perf_counter() - begun) if turn > 1 else 0.0)
print(best)
"""
NOT_EQUAL = {
    "both": (
        "The order of the examples; in each epoch each sees every row once, none of which has to be cut.",
        "Upstream pads each microbatch to the longest example of the batch, TRL to the longest of the microbatch.",
        "TRL tokenizes all rows before its first step, upstream each batch as it is needed.",
        "TRL computes log probabilities in chunks, without all logits at once, and entropy and accuracy each step.",
        "TRL's warm-up begins with a step of learning rate 0, upstream's with 1/151 of the rate.",
        "TRL writes nothing at the end; the others write the weights and RMSprop's state: whole process, peak memory.",
    ),
    "sft": (
        "TRL's loss is a mean over tokens, upstream's a sum over each response: gradients, and their clipping, differ.",
    ),
    "bf16": ("Upstream's weights are bfloat16, which loses small updates; those of the others stay float32.",),
    "dpo": ("TRL reads the weights from the model's folder, the others also from policy.pt: time to the first step.",),
}


@dataclass(frozen=True)
class Stage:
    """A stage's settings, those of AmberSafe: examples an optimizer step, microbatches in it, learning rate."""

    name: str
    batch: int
    microbatches: int
    lr: float


STAGES = {"sft": Stage("sft", 64, 2, 2e-7), "dpo": Stage("dpo", 32, 4, 5e-7)}


@dataclass(frozen=True)
class Task:
    """What every variant is given: the folder that holds model, policy.pt and data, and how long to train on it."""

    stage: Stage
    folder: Path
    data: Path
    epochs: int
    bf16: bool
    lora: int | None = None  # the rank of an adapter, which upstream does not have

    @property
    def settings(self) -> list[str]:
        """Upstream's keys that leave nothing but training to be timed."""
        return [
            f"n_eval_examples={bench_data.TEST_ROWS}",
            f"eval_batch_size={bench_data.TEST_ROWS}",
            "do_first_eval=false",
            f"eval_every={self.stage.batch * 1_000_000}",
            "minimum_log_interval_secs=0",
            *([] if self.bf16 else ["model.reference_dtype=float32"]),
        ]


@dataclass(frozen=True)
class Variant:
    """Something to be timed: `command` makes the argument list for a task and the folder that it runs in."""

    name: str
    command: Callable[[Task, Path], list[str]]
    imports: float  # MB
    versions: str


def upstream_command(clone: Path, task: Task, folder: Path) -> list[str]:
    """train.py by hand, with the keys that it has at that commit."""
    stage = task.stage
    (folder / "run").mkdir()
    of_stage = ["loss=sft"] if stage.name == "sft" else ["loss=dpo", "loss.beta=0.1"]
    archive = [] if stage.name == "sft" else [f"model.archive={task.folder / 'policy.pt'}"]
    dtypes = ["model.policy_dtype=bfloat16", "model.reference_dtype=bfloat16"] if task.bf16 else []
    return [
        *(sys.executable, str(clone / "train.py"), "model=blank_model", f"model.name_or_path={task.folder / 'model'}"),
        *("model.block_name=LlamaDecoderLayer", "datasets=[saferlhf]", "max_length=512", "max_prompt_length=256"),
        *(f"n_epochs={task.epochs}", f"batch_size={stage.batch}", f"lr={stage.lr}"),
        *(f"gradient_accumulation_steps={stage.microbatches}", "sample_during_eval=false", "wandb.enabled=false"),
        *("trainer=BasicTrainer", "exp_name=upstream", f"local_run_dir={folder / 'run'}"),
        *of_stage,
        *archive,
        *dtypes,
        *task.settings,
    ]


def ambersafe_command(clone: Path, overrides: Sequence[str], task: Task, folder: Path) -> list[str]:
    """The command of this project, with the recipe's batch, microbatches, learning rate and beta."""
    archive = [] if task.stage.name == "sft" else ["--archive", str(task.folder / "policy.pt")]
    return [
        *(*AMBERSAFE, task.stage.name, "--recipe", "ambersafe", "--plain", "--trainer", "BasicTrainer"),
        *("--model", str(task.folder / "model"), "--data", str(task.data), "--dir", str(clone)),
        *("--epochs", str(task.epochs), *archive, *(["--bf16"] if task.bf16 else [])),
        *(["--lora", "--lora-rank", str(task.lora), "--lora-alpha", str(2 * task.lora)] if task.lora else []),
        *(*task.settings, "do_final_eval=false", *overrides),
    ]


def trl_command(python: Path, settings: Mapping[str, Any], task: Task, folder: Path) -> list[str]:
    request = {
        "stage": task.stage.name,
        "model": str(task.folder / "model"),
        "rows": str(task.data / "train.jsonl"),
        "batch": task.stage.batch,
        "microbatches": task.stage.microbatches,
        "lr": task.stage.lr,
        "epochs": task.epochs,
        "lora": task.lora,
        "settings": {"bf16": task.bf16, **settings},
    }
    return [str(python), str(HERE / "bench_trl.py"), json.dumps(request)]


def make_trl_environment() -> Path:
    """The interpreter of an environment with TRL at the top of the checkout, made there unless it is there."""
    folder = ROOT / ".venv-trl"
    python = folder / "bin/python"
    is_whole = (
        python.exists()
        and not subprocess.run([python, "-c", "import trl, torch, peft"], capture_output=True).returncode
    )
    if not is_whole:
        print(f"making {folder} …", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        constraints = ["--constraint", str(HERE / "constraints.txt")]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *constraints, TRL, "torch", "peft"], check=True)
    return python


def probe(python: Path | str) -> tuple[float, str, str]:
    """What the imports of a training hold resident at the most, in MB, the GPU's name, and versions."""
    printed = subprocess.run([python, "-c", PROBE], check=True, capture_output=True, text=True).stdout
    kilobytes, device, versions = json.loads(printed.splitlines()[-1])
    return kilobytes / 1024, device, versions


def matrix_rate(dtype: str) -> float:
    """Operations a second of a product of matrices of this type, on the GPU if there is one."""
    command = [sys.executable, "-c", MATRIX_RATE, dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def make_variants(given: argparse.Namespace, clone: Path) -> tuple[list[Variant], str]:
    """What is to be compared, the baseline first, and the GPU's name."""
    imports, device, versions = probe(sys.executable)
    variants = []
    if "upstream" in given.only:
        commit = next(patch.commit for patch in patches.read_series() if patch.name.startswith(LAST_MEND))
        mended = worktrees.folder_at(clone, commit)
        variants.append(Variant("upstream", partial(upstream_command, mended), imports, versions))
    own = ([("ambersafe", given.set)] if "ambersafe" in given.only else []) + given.also
    for name, overrides in own:
        variants.append(Variant(name, partial(ambersafe_command, clone, overrides), imports, versions))
    if "trl" in given.only:
        python = given.trl_python or make_trl_environment()
        settings = dict(given.trl_set)
        of_trl, _, versions = probe(python)
        variants.append(Variant("trl", partial(trl_command, python, settings), of_trl, f"{TRL}, {versions}"))
    return variants, device


def train(variant: Variant, task: Task) -> bench_runs.Run:
    """One run of a variant in a folder of its own, which goes when it has ended."""
    folder = Path(tempfile.mkdtemp(dir=task.folder, prefix=f"{variant.name}_"))
    environment = {
        "SAFERLHF_DATASET": str(task.data),
        "SAFERLHF_REVISION": "",
        "PYTHONUNBUFFERED": "1",  # or lines come by the block
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    try:
        return bench_runs.run(variant.command(task, folder), folder, environment)
    finally:
        shutil.rmtree(folder)


def make_task(given: argparse.Namespace, folder: Path, name: str, examples: int, epochs: int) -> tuple[Task, float]:
    """Write the rows, and return the task with the mean length of its examples in tokens."""
    rows = bench_data.write_data(folder / name, examples, bench_data.SHAPES[given.size])
    tokens = [row.sft_tokens if given.stage == "sft" else row.dpo_tokens for row in rows]
    return Task(STAGES[given.stage], folder, folder / name, epochs, given.bf16, given.lora), statistics.mean(tokens)


def choose_steps(given: argparse.Namespace, baseline: Variant, folder: Path) -> int:
    """As many steps as make about `--seconds`, by the time that the baseline takes for a few."""
    task, _ = make_task(given, folder, "few", STEPS_TO_CALIBRATE * STAGES[given.stage].batch, 1)
    made = bench_runs.steps(train(baseline, task).lines)
    steps: float = given.seconds * (len(made) - 1) / (made[-1].time - made[0].time)
    return max(2, round(steps))


def cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The figures of each variant, and its ratio to the first one, turn by turn."""
    baseline = next(iter(runs))
    lines = [f"{'':21} {'':12} {'median':>9} {'min':>9} {'max':>9}   by {baseline}: median, min to max"]
    for figure in runs[baseline][0]:
        for name, made in runs.items():
            values = [one[figure] for one in made]
            found = bench_runs.spread(values)
            numbers = " ".join(f"{value:9.2f}" for value in (found.median, found.least, found.greatest))
            ratio = bench_runs.ratios(values, [one[figure] for one in runs[baseline]])
            of_pairs = f"{ratio.median:8.3f}, {ratio.least:.3f} to {ratio.greatest:.3f}" if name != baseline else ""
            lines.append(f"{figure if name == baseline else '':21} {name:12} {numbers}   {of_pairs}".rstrip())
    return "\n".join(lines)


def losses(printed: Mapping[str, Sequence[bench_runs.Step]]) -> str:
    """The first steps' loss and gradient norm side by side, and how far all those of a variant equal the first's."""
    baseline, *others = printed
    lines = []
    for key in ("loss/train", "grad_norm"):
        lines.append(f"{key:12} " + " ".join(f"{name[:14]:>14}" for name in printed))
        for number in range(min(STEPS_SHOWN, *map(len, printed.values()))):
            values = " ".join(f"{made[number].metrics[key]:>14}" for made in printed.values())
            lines.append(f"  step {number + 1:5} {values}")
        for name in others:
            pairs = [(a.metrics[key], b.metrics[key]) for a, b in zip(printed[baseline], printed[name], strict=True)]
            lines.append(f"  {name}: {bench_runs.equality(pairs)} in {len(pairs)} steps")
    return "\n".join(lines)


def names(text: str) -> list[str]:
    found = text.split(",")
    if unknown := set(found) - set(NAMES):
        raise argparse.ArgumentTypeError(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return found


def named_overrides(text: str) -> tuple[str, list[str]]:
    """NAME:KEY=VALUE,KEY=VALUE; a comma that no KEY= follows belongs to a value."""
    name, _, overrides = text.partition(":")
    if not re.fullmatch(r"[\w.-]+", name) or name in NAMES or "=" not in overrides:
        raise argparse.ArgumentTypeError(f"{text!r}: NAME:KEY=VALUE,… with a name of its own")
    return name, re.split(r",(?=[\w.+]+=)", overrides)


def trl_setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default="dpo")
    parser.add_argument("--size", choices=bench_data.SHAPES, default="7M")
    parser.add_argument("--only", type=names, default=list(NAMES), help="some of upstream,ambersafe,trl")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the variant ambersafe")
    also = "one more variant of this project, without what --set says: NAME:KEY=VALUE,KEY=VALUE"
    parser.add_argument("--also", action="append", type=named_overrides, default=[], metavar="NAME:…", help=also)
    parser.add_argument(
        "--trl-set", action="append", type=trl_setting, default=[], metavar="KEY=VALUE", help="of TRL's config"
    )
    parser.add_argument("--trl-python", type=Path, help="an interpreter with TRL; without it .venv-trl is made")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--seconds", type=float, default=60, help="of a run of the first variant, without --steps")
    parser.add_argument("--epochs", type=int, help="train so many times on --examples rows")
    parser.add_argument("--examples", type=int, default=320, help="with --epochs; cut to whole batches")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: each in the way that it has")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters on all linear layers, not upstream")
    parser.add_argument("--utilisation", action="store_true", help="the share of what a product of matrices reaches")
    parser.add_argument("--clone", type=Path, help="what `ambersafe setup --dir` made, or will make here")
    parser.add_argument("--show-losses", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.steps and given.epochs:
        parser.error("--steps or --epochs, not both")
    if given.steps is not None and given.steps < 2:
        parser.error("--steps: 2 at least")
    if given.epochs and given.examples < 2 * STAGES[given.stage].batch:
        parser.error(f"--examples: {2 * STAGES[given.stage].batch} at least, two batches")
    return given


def benchmark(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything, print what is found, and return it for `--json`."""
    stage = STAGES[given.stage]
    clone = (given.clone or folder / "clone").resolve()
    subprocess.run([*AMBERSAFE, "setup", "--dir", str(clone)], check=True, capture_output=True)
    variants, device = make_variants(given, clone)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = f"{cpu_model()}, {THREADS} cores, {device}, {date}"
    print(machine)
    for variant in variants:
        print(f"  {variant.name:12} {variant.versions}")
    build = [sys.executable, str(HERE / "bench_data.py"), str(folder), given.size]
    subprocess.run(build, check=True, capture_output=True)
    if given.epochs:
        examples, epochs = given.examples // stage.batch * stage.batch, given.epochs
    else:
        examples, epochs = (given.steps or choose_steps(given, variants[0], folder)) * stage.batch, 1
    task, tokens = make_task(given, folder, "data", examples, epochs)
    what = f"{stage.name}, {given.size}, {examples} examples x {epochs}, {stage.batch} a step in {stage.microbatches}"
    print(f"{what}, {tokens:.1f} tokens an example; {given.repeat} times", flush=True)

    rate, operations = 0.0, 0.0
    if given.utilisation:
        rate = matrix_rate("bfloat16" if given.bf16 else "float32")
        length = tokens if stage.name == "sft" else tokens / 2
        operations = bench_data.SHAPES[given.size].operations(tokens, length)
        print(f"a product of matrices: {rate / 1e12:.2f} TFLOP/s; an example: {operations / 1e12:.3f} TFLOP")
    runs: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
    printed: dict[str, list[bench_runs.Step]] = {}
    for number in range(given.repeat):
        # There and back, so that nothing is always the first or always after the same one.
        for variant in variants if number % 2 == 0 else variants[::-1]:
            one = train(variant, task)
            made = bench_runs.steps(one.lines)
            if len(made) * stage.batch != examples * epochs:
                raise SystemExit(f"error: {variant.name} made {len(made)} steps of {examples * epochs // stage.batch}")
            found = bench_runs.figures(one, tokens, variant.imports)
            if rate:
                found["% of matrix rate"] = 100 * found["examples/s"] * operations / rate
            runs[variant.name].append(found)
            printed[variant.name] = made
    print(f"\n{table(runs)}")
    if given.show_losses:
        print(f"\n{losses({variant.name: printed[variant.name] for variant in variants if variant.name != 'trl'})}")
    not_equal = [*NOT_EQUAL["both"], *NOT_EQUAL[stage.name]] if "trl" in runs else []
    not_equal += NOT_EQUAL["bf16"] if given.bf16 else []
    if not_equal:
        print("\nWhat could not be made equal:\n" + "\n".join(f"- {text}" for text in not_equal))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    return {
        "machine": machine,
        "versions": {variant.name: variant.versions for variant in variants},
        "settings": settings,
        "task": {"stage": asdict(stage), "examples": examples, "epochs": epochs, "tokens_an_example": tokens},
        "runs": runs,
        "not_equal": not_equal,
    }


def main() -> None:
    given = read_arguments()
    # Or what it has started would go on, and its folder stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        found = benchmark(given, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
