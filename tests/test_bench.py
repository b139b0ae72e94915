"""The benchmark of training: what it makes of lines and rows. What it measures is not tested, machines differ."""

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import bench_train
import training_inputs


def test_the_benchmarks_are_listed_with_what_they_tell_and_a_wrong_name_is_an_error() -> None:
    listed = subprocess.run([ROOT / "scripts/bench"], capture_output=True, text=True)
    assert listed.returncode == 0
    for path in (ROOT / "scripts").glob("bench_*.py"):
        assert f"  {path.stem.removeprefix('bench_')} " in listed.stdout
    wrong = subprocess.run([ROOT / "scripts/bench", "nothing"], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "there is no benchmark nothing" in wrong.stderr


def test_a_benchmark_gets_the_flags_behind_its_name() -> None:
    done = subprocess.run([ROOT / "scripts/bench", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--show-losses" in done.stdout


def test_rates_come_from_when_lines_arrived_and_not_from_what_they_say() -> None:
    lines = [(0.5, "building policy\n"), (1.0, "Creating trainer on process 0 with world size 1\n")]
    lines += [(4.0 + step, f"train stats after {32 * (step + 1)} examples: {{}}\n") for step in range(5)]
    lines.append((9.5, "writing checkpoint to x...\n"))
    begun, steps, said = bench_train.read_lines(lines)
    run = bench_train.Measured(begun, steps, 9.5, 0, said)
    assert run.examples_per_second == 160 / 7
    assert run.steps_per_second == 1
    assert run.first_step == 4
    assert len(said) == 5


def test_ratios_are_those_of_runs_of_one_round() -> None:
    assert bench_train.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert bench_train.spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"


def test_lengths_are_those_that_the_benchmark_promises() -> None:
    rng = random.Random(0)
    found = sorted(training_inputs.length(rng, *training_inputs.RESPONSE) for _ in range(20_000))
    assert statistics.median(found) == pytest.approx(55, abs=2)
    assert found[int(0.95 * len(found))] == pytest.approx(165, abs=8)
    assert 0 < sum(each >= 300 for each in found) / len(found) < 0.01
    assert max(found) <= training_inputs.LONGEST


def test_rows_have_prompts_of_their_own_and_their_tokens_are_counted(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(50)]
    every = list(training_inputs.rows(400, words, seed=3))
    assert len({row["prompt"] for row in every}) == 400
    assert every == list(training_inputs.rows(400, words, seed=3))
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in every))
    dpo, sft = (bench_train.mean_tokens(path, stage) for stage in ("dpo", "sft"))
    assert dpo > 2 * math.exp(math.log(15)) + 2 * 55
    lengths = [len(f"{row['prompt']} {row['response_0']} {row['prompt']} {row['response_1']}".split()) for row in every]
    assert dpo == pytest.approx(statistics.mean(lengths) + 2)
    assert 0.4 * dpo < sft < 0.6 * dpo
