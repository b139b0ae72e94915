#!/usr/bin/env python3
"""Compares the memory that a training takes with the arithmetic of `ambersafe plan` (Linux, on the CPU).

    scripts/bench_memory.py [--only NAME,NAME] [--parts] [--clone FOLDER] [--json FILE]

Each configuration is a real `ambersafe sft` or `dpo` of two steps, of a LLaMA with random weights (bench_data.py) on
rows that are all of one length, so that the arithmetic has nothing to guess. Measured is the peak resident set
(VmHWM) of train.py's process, less what imports, tokenizer and data take, which is that of the same training of a
model of next to nothing; glibc's MALLOC_MMAP_THRESHOLD_=262144 has it give back what is freed, as otherwise holes
would count. Where weights are mapped from a file, its pages count once they were read. What PyTorch's own buffers for
products of matrices take is not in the arithmetic.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import bench_data
import bench_runs

from ambersafe_cli import checkpoints, memory
from ambersafe_cli.overrides import Value, assign

AMBERSAFE = (sys.executable, "-m", "ambersafe_cli")
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "262144", "HF_HUB_OFFLINE": "1"}
PROMPT = 8
NOTHING = bench_data.Shape(hidden=32, layers=1, heads=1, ffn=32, vocabulary=1000)
COMMON: Mapping[str, Value] = {
    "eval_batch_size": 4,
    "n_eval_examples": 4,
    "do_first_eval": True,
    "do_final_eval": False,
    "warmup_steps": 0,
    "prefetch_batches": 0,
    "n_epochs": 1,
}
FULL: Mapping[str, Value] = {"model.reference_dtype": "float32"}
LORA: Mapping[str, Value] = {"lora": True, "optimizer": "AdamW"}


@dataclass(frozen=True)
class Case:
    """A training: `length` is that of every sequence in tokens, `batch` and `microbatches` are those of a step."""

    stage: str
    length: int
    batch: int
    microbatches: int
    values: Mapping[str, Value] = field(default_factory=dict)


CASES = {
    "SFT, RMSprop": Case("sft", 64, 8, 1, FULL),
    "SFT, activations": Case("sft", 256, 16, 2, FULL),
    "DPO, AdamW, reference": Case(
        "dpo", 64, 4, 2, {**FULL, "optimizer": "AdamW", "cache_reference": False}
    ),
    "DPO, --bf16": Case("dpo", 128, 8, 2, {"mixed_precision": "bfloat16", "model.reference_dtype": "float32"}),
    "LoRA DPO": Case("dpo", 256, 8, 2, LORA),
    "LoRA DPO, checkpointed": Case("dpo", 480, 16, 2, {**LORA, "activation_checkpointing": True}),
    "LoRA DPO, bfloat16": Case(
        "dpo", 256, 8, 2, {**LORA, "mixed_precision": "bfloat16", "model.policy_dtype": "bfloat16"}
    ),
    "QLoRA SFT, 4bit": Case(
        "sft", 256, 16, 2,
        {**LORA, "mixed_precision": "bfloat16", "model.policy_dtype": "bfloat16", "quantize": "4bit"},
    ),
}  # fmt: skip


def write_rows(folder: Path, rows: int, length: int, vocabulary: int) -> None:
    """Rows whose sequences have all `length` tokens, EOS included, to train on and as many to evaluate with."""
    source = random.Random(bench_data.SEED)  # noqa: S311
    words = [f"w{index}" for index in range(vocabulary - len(bench_data.SPECIAL_TOKENS))]
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        made = []
        for number in range(rows):
            prompt, chosen, rejected = (source.choices(words, k=k) for k in (PROMPT, *[length - PROMPT - 1] * 2))
            made.append(bench_data.Row(prompt, chosen, rejected, bool(number % 2)))
        bench_data.write_rows(made, folder / f"{split}.jsonl")


def measure(task: Path, clone: Path, case: Case) -> int:
    """The peak resident set of a case's train.py in bytes; `task` has the model and the archive."""
    folder = Path(tempfile.mkdtemp(dir=task, prefix="run_"))
    vocabulary = json.loads((task / "model/config.json").read_text())["vocab_size"]
    write_rows(folder / "data", max(2 * case.batch, 4), case.length, vocabulary)
    values = {**COMMON, "eval_every": 100 * case.batch, "trainer": "BasicTrainer", **case.values}
    archive = ["--archive", str(task / "policy.pt")] if case.stage == "dpo" else []
    command = [
        *(*AMBERSAFE, case.stage, "--plain", "--no-preflight", "--recipe", "ambersafe", "--dir", str(clone), *archive),
        *("--model", str(task / "model"), "--data", str(folder / "data"), "--batch-size", str(case.batch)),
        *("--grad-accum", str(case.microbatches), *(assign(key, value) for key, value in values.items())),
    ]
    run = bench_runs.run(command, folder, {**SETTINGS, "HF_DATASETS_CACHE": str(folder / "cache")})
    return int(run.peak * 2**20)


def predict(task: Path, case: Case) -> tuple[memory.Moment, ...]:
    """The arithmetic's moments of a case."""
    config = {
        "model.policy_dtype": "float32", "optimizer": "RMSprop", "cache_reference": True, "response_logits_only": True,
        "batch_size": case.batch, "gradient_accumulation_steps": case.microbatches, "trainer": "BasicTrainer",
        **COMMON, **case.values,
    }  # fmt: skip
    shape = memory.shape_of(checkpoints.model_shapes(task / "model") or {})
    lengths = memory.Lengths(case.length, case.length - PROMPT)
    return memory.moments(case.stage, config, shape, lengths, 1, on_gpu=False)


def compare(task: Path, nothing: Path, clone: Path, case: Case) -> tuple[tuple[memory.Moment, ...], int]:
    """The arithmetic's moments of a case, and what it takes beyond the same training of next to nothing, in bytes."""
    small = measure(nothing, clone, case) - memory.peak(predict(nothing, case)).bytes
    return predict(task, case), measure(task, clone, case) - small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {'; '.join(CASES)}; separated by ;")
    parser.add_argument("--size", choices=bench_data.SHAPES, default="60M")
    parser.add_argument("--clone", type=Path, help="a patched clone (default: it is made)")
    parser.add_argument("--parts", action="store_true", help="print every moment and part")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        task, nothing = Path(place, "model"), Path(place, "nothing")
        bench_data.build_model(task, bench_data.SHAPES[given.size])
        bench_data.build_model(nothing, NOTHING)
        clone = given.clone or Path(place, "direct-preference-optimization")
        if not given.clone:
            subprocess.run([*AMBERSAFE, "setup", "--dir", str(clone)], check=True, capture_output=True)
        for name in given.only.split(";") if given.only else CASES:
            predicted, measured = compare(task, nothing, clone, CASES[name])
            most = memory.peak(predicted)
            found[name] = {"predicted": most.bytes, "measured": measured}
            sizes = f"{most.bytes / 1e6:7.0f} MB  {measured / 1e6:7.0f} MB  {most.bytes / measured:.2f}"
            print(f"{name:24} {sizes}  when {most.name}", flush=True)
            for moment in predicted if given.parts else ():
                parts = ", ".join(f"{part.name} {part.bytes / 1e6:.0f}" for part in moment.parts)
                print(f"    {moment.name} {moment.bytes / 1e6:.0f}: {parts}")
    if given.json:
        given.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
