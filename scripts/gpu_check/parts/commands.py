"""`ambersafe` itself on a tiny LLaMA: both trainers, both stages, stopped and resumed, adapters, and the use of a run.

Losses are held against those of a CPU in float32. Several commands run at once: nothing here is timed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ambersafe_cli
from ambersafe_cli import demo, metrics, runs
from gpu_check.figures import Report, Setup

AMBERSAFE = (sys.executable, "-m", "ambersafe_cli")
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
WITHOUT_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
FSDP = ("--trainer", "FSDPTrainer", "--nproc", "1")
BASIC = ("--trainer", "BasicTrainer")
SHORT = ("n_epochs=null", "n_examples=256", "eval_every=128")
SAMPLES = ("--lora", "--bf16", "sample_during_eval=true", "cache_reference=false", "n_epochs=null", "n_examples=32")
WAITED = 120


@dataclass
class Commands:
    """Where commands run, with what they are all given, and which of them failed."""

    setup: Setup
    report: Report
    failed: list[str] = field(default_factory=list)

    def given(self, stage: str) -> list[str]:
        where = self.setup.folder
        given = ["--recipe", "tiny", "--model", str(where / "model"), "--data", str(demo.DATA)]
        return [stage, "--plain", "--dir", str(self.setup.clone), *given]

    def start(self, name: str, words: Iterable[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        folder = self.setup.folder / name
        folder.mkdir(exist_ok=True)
        with (folder / "stdout.txt").open("w") as out, (folder / "stderr.txt").open("w") as err:
            return subprocess.Popen(
                [*AMBERSAFE, *words],
                cwd=folder,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def run(self, name: str, words: Iterable[str], environment: Mapping[str, str] | None = None) -> str:
        """Run a command in a folder of its name; return its stdout, and remember it if it fails."""
        begun = time.monotonic()
        words = list(words)
        child = self.start(name, words, environment or {})
        child.wait()
        folder = self.setup.folder / name
        if child.returncode:
            self.failed.append(name)
            last = "\n      ".join((folder / "stderr.txt").read_text(errors="replace").strip().splitlines()[-6:])
            self.report.text(f"{name} ended with {child.returncode}", f"ambersafe {' '.join(words)}\n      {last}")
        else:
            self.report.text(name, f"{time.monotonic() - begun:.1f} s")
        return (folder / "stdout.txt").read_text(errors="replace")

    def folder(self, name: str) -> Path | None:
        """The folder of the run of this name."""
        found = sorted((self.setup.folder / name / ".cache" / runs.user_name()).glob(f"{name}_*"))
        return found[-1] if found else None

    def records(self, name: str, kind: str = "train") -> list[metrics.Record]:
        folder = self.folder(name)
        log = folder / "train.log" if folder else None
        found = metrics.read(log) if log and log.exists() else ()
        return [each for each in found if isinstance(each, metrics.Record) and each.kind == kind]

    def losses(self, name: str) -> list[float]:
        return [float(each.values["loss/train"]) for each in self.records(name)]

    def stop_and_resume(self, name: str, words: Iterable[str]) -> bool:
        """Send SIGTERM when a step has been made, and go on; return whether a checkpoint was saved for it."""
        child = self.start(name, words, {})
        deadline = time.monotonic() + WAITED
        while time.monotonic() < deadline and child.poll() is None and len(self.losses(name)) < 2:
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=WAITED)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        folder = self.folder(name)
        log = (folder / "train.log").read_text(errors="replace") if folder else ""
        stopped = re.search(r"^stopped by signal \d+ after (\d+) examples", log, re.MULTILINE)
        is_saved = bool(folder and stopped and (folder / f"step-{stopped[1]}" / "policy.pt").is_file())
        if folder is None or child.returncode == 0:
            self.failed.append(f"stopping {name}")  # it came to its end, or never began
            return False
        self.run(f"{name}-again", ["resume", str(folder), "--plain"])
        return is_saved


def furthest(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two runs' losses, infinite if one has no or other steps."""
    if not ours or len(ours) != len(theirs):
        return float("inf")
    return max(abs(a - b) / max(abs(a), abs(b), 1e-9) for a, b in zip(ours, theirs, strict=True))


def build(setup: Setup) -> None:
    """The tiny LLaMA of `ambersafe demo`."""
    builder = Path(ambersafe_cli.__file__).parent / "children" / "tiny_model.py"
    command = [sys.executable, str(builder), str(setup.folder / "model"), str(demo.DATA / "train.jsonl")]
    subprocess.run(command, check=True, capture_output=True)


def trainings(own: Commands, stage: str, archive: tuple[str, ...]) -> dict[str, tuple[list[str], Mapping[str, str]]]:
    """The commands of a stage by their names, each with its environment."""
    given = own.given(stage)
    made: dict[str, tuple[list[str], Mapping[str, str]]] = {}
    for name, trainer, more, environment in (
        ("cpu", BASIC, SHORT, ON_CPU),
        ("basic", BASIC, SHORT, {}),
        ("exact", BASIC, SHORT, WITHOUT_TF32),
        ("fsdp", FSDP, SHORT, {}),
        ("lora", BASIC, SAMPLES, {}),
        ("lora-fsdp", FSDP, SAMPLES, {}),
    ):
        if name in ("basic", "exact", "fsdp", "cpu") or stage == "sft" or archive:
            words = [*given, *archive, *trainer, *more, "--exp-name", f"{stage}-{name}"]
            made[f"{stage}-{name}"] = (words, environment)
    if not own.setup.on_gpu:
        del made[f"{stage}-exact"]  # there is no TF32 on a CPU
        if stage == "dpo":
            del made["dpo-lora-fsdp"]
    return made


def compare_losses(own: Commands) -> None:
    for stage in ("sft", "dpo"):
        title = stage.upper()
        on_cpu, ours = own.losses(f"{stage}-cpu"), own.losses(f"{stage}-basic")
        own.report.text(f"{title} losses on a CPU", f"{on_cpu[0]:.5f} to {on_cpu[-1]:.5f}" if on_cpu else "none")
        for name, losses in (("on", ours), ("off", own.losses(f"{stage}-exact"))) if own.setup.on_gpu else ():
            first, all_ = furthest(losses[:3], on_cpu[:3]), furthest(losses, on_cpu)
            own.report.figure(f"{title}, first 3 losses, TF32 {name}, by a CPU's, relative", first)
            own.report.figure(f"{title}, all losses, TF32 {name}, by a CPU's, relative", all_)
        by_fsdp = furthest(own.losses(f"{stage}-fsdp"), ours)
        own.report.figure(f"{title} loss, FSDP by BasicTrainer, relative", by_fsdp)
    firsts = [record for name in ("dpo-basic", "dpo-fsdp") for record in own.records(name, "eval")[:1]]
    names = ("rewards_eval/chosen", "rewards_eval/rejected", "rewards_eval/margins")
    rewards = [abs(float(first.values[name])) for first in firsts for name in names]
    own.report.figure("largest reward at step 0 of DPO", max(rewards) if len(firsts) == 2 else float("inf"))


def stop_and_resume(own: Commands, pool: ThreadPoolExecutor) -> None:
    examples = own.setup.size(9600, 960)
    long = ("n_epochs=null", f"n_examples={examples}", f"eval_every={examples // 2}")
    given = own.given("sft")
    undisturbed = pool.submit(own.run, "sft-whole", [*given, *BASIC, *long, "--exp-name", "sft-whole"])
    stopped = {
        name: pool.submit(own.stop_and_resume, name, [*given, *trainer, *long, "--exp-name", name])
        for name, trainer in (("sft-stopped", BASIC), ("sft-stopped-fsdp", FSDP))
    }
    saved = sum(each.result() for each in stopped.values())
    undisturbed.result()
    own.report.figure("checkpoints saved at SIGTERM", saved)
    resumed = furthest(own.losses("sft-stopped"), own.losses("sft-whole"))
    own.report.figure("loss after resume, by an undisturbed run's, relative", resumed)


def use(own: Commands, pool: ThreadPoolExecutor) -> None:
    """What is done with a run: evaluate, sample, export."""
    run = own.folder("dpo-basic")
    if run is None:
        return
    common = ("--dir", str(own.setup.clone))
    evaluating = pool.submit(own.run, "evaluate", ["evaluate", str(run), "--json", *common])
    sampling = pool.submit(own.run, "sample", ["sample", str(run), "--json", "--max-new-tokens", "8", *common])
    exporting = pool.submit(own.run, "export", ["export", str(run), "--out", str(own.setup.folder / "exported")])
    answers = sampling.result()
    exporting.result()
    own.report.text("sampled", f"{answers.count('stopped')} answers")
    if not list((own.setup.folder / "exported").glob("*.safetensors")):
        own.failed.append("export")
    found: Any = json.loads(evaluating.result() or "{}")
    own.report.figure("evaluate by the run's own evaluation, relative", apart(found))


def apart(found: Any) -> float:
    """How far `evaluate` is from what the run had found itself, relative, in the mean log-probability of the chosen
    responses; infinite if it says nothing."""
    logps = ((found.get("upstream") or {}).get("metrics") or {}).get("logps_eval/chosen")
    return abs(logps["here"] - logps["upstream"]) / abs(logps["upstream"]) if logps else float("inf")


def run(setup: Setup, report: Report) -> None:
    build(setup)
    own = Commands(setup, report)
    with ThreadPoolExecutor(max_workers=setup.size(6, 2)) as pool:
        for stage in ("sft", "dpo"):
            start = own.folder("sft-cpu")
            archive = ("--archive", str(start)) if stage == "dpo" and start else ()
            list(pool.map(lambda each: own.run(each[0], *each[1]), trainings(own, stage, archive).items()))
        # Each by itself: what one of them does not bear must not cost the figures of the others.
        for work in (partial(compare_losses, own), partial(stop_and_resume, own, pool), partial(use, own, pool)):
            try:
                work()
            except Exception as error:
                own.failed.append(f"{work.func.__name__}: {error!r}")
    report.figure("commands that failed", len(own.failed), ", ".join(own.failed))
