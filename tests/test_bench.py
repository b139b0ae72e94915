"""The benchmark of training: what it makes of lines, lengths and ratios. How fast anything is, no test says."""

import argparse
import random
import statistics
import subprocess
import sys
from pathlib import Path

import bench_data
import bench_runs
import bench_train
import pytest
from bench_runs import Line
from conftest import ROOT

from ambersafe_cli import saferlhf

pytestmark = pytest.mark.cold

LINES = (
    Line(2.0, "building reference model"),
    Line(2.5, "Creating trainer on process 0 with world size 1"),
    Line(5.0, "Using RMSprop optimizer"),
    Line(8.0, "train stats after 32 examples: {'loss/train': '0.69315', 'counters/updates': 1}"),
    Line(9.0, "something else"),
    Line(10.0, "train stats after 64 examples: {'loss/train': '0.69', 'counters/updates': 2}"),
    Line(16.0, "train stats after 96 examples: {}"),
)


def test_figures_are_of_the_times_at_which_the_lines_of_steps_came() -> None:
    found = bench_runs.figures(bench_runs.Run(LINES, 20.0, 35.0, 1000.0), tokens_per_example=150.0, imports=300.0)
    assert found == {
        "examples/s": 8.0,  # 64 from 8.0 to 16.0
        "tokens/s": 1200.0,
        "training, s": 11.0,
        "whole process, s": 20.0,
        "processor time, s": 35.0,
        "to the first step, s": 8.0,
        "peak memory, MB": 1000.0,
        "beyond imports, MB": 700.0,
    }


def test_training_begins_with_the_pass_of_the_reference_model() -> None:
    lines = (*LINES[:2], Line(3.0, "building reference model"), *LINES[2:])
    assert bench_runs.figures(bench_runs.Run(lines, 20.0, 0.0, 0.0), 1.0, 0.0)["training, s"] == 13.0


def test_trl_begins_where_its_own_line_says() -> None:
    lines = (Line(1.0, "training begins"), *LINES[3:])
    assert bench_runs.figures(bench_runs.Run(lines, 20.0, 0.0, 0.0), 1.0, 0.0)["training, s"] == 15.0


def test_one_step_makes_no_speed() -> None:
    with pytest.raises(ValueError, match="1 steps"):
        bench_runs.figures(bench_runs.Run(LINES[:5], 1.0, 0.0, 0.0), 1.0, 0.0)


def test_steps_keep_their_metrics_as_printed() -> None:
    made = bench_runs.steps(LINES)
    assert [step.examples for step in made] == [32, 64, 96]
    assert made[0].metrics["loss/train"] == "0.69315"


def test_ratios_are_of_the_runs_of_one_turn() -> None:
    assert bench_runs.ratios([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == bench_runs.Spread(3.0, 2.0, 4.0)
    assert bench_runs.spread([3.0, 1.0]) == bench_runs.Spread(2.0, 1.0, 3.0)


def test_equality_tells_digits_from_four_digits_from_neither() -> None:
    assert bench_runs.equality([("0.5", "0.5")]) == "equal to every printed digit"
    assert bench_runs.equality([("0.5", "0.5"), ("0.69315", "0.69316")]).startswith("equal to 4 digits")
    assert bench_runs.equality([("0.5", "0.501")]).startswith("NOT equal")


def test_peak_is_that_of_the_largest_process_below_the_command(tmp_path: Path) -> None:
    holds = "import time; held = bytearray(200_000_000); print('held', flush=True); time.sleep(1)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {holds!r}], check=True)"
    run = bench_runs.run([sys.executable, "-c", starts], tmp_path, {})
    assert [line.text for line in run.lines] == ["held"]
    assert 190 < run.peak < 300


def test_a_failure_shows_the_last_lines(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="what is wrong\nerror: exit status 3"):
        bench_runs.run([sys.executable, "-c", "print('what is wrong'); raise SystemExit(3)"], tmp_path, {})


@pytest.mark.parametrize("lengths", [bench_data.PROMPTS, bench_data.RESPONSES])
def test_lengths_have_their_median_and_95th_percentile(lengths: bench_data.Lengths) -> None:
    source = random.Random(1)
    drawn = [bench_data.draw_length(lengths, source) for _ in range(20_000)]
    assert statistics.median(drawn) == pytest.approx(lengths.median, rel=0.05)
    assert statistics.quantiles(drawn, n=20)[-1] == pytest.approx(lengths.percentile_95, rel=0.07)
    assert lengths.lowest <= min(drawn)
    assert max(drawn) <= lengths.highest


def test_rows_are_unique_uncut_and_the_same_again() -> None:
    shape = bench_data.SHAPES["7M"]
    rows = bench_data.make_rows(2000, shape, seed=0)
    assert len({tuple(row.prompt) for row in rows}) == 2000
    responses = [len(response) for row in rows for response in (row.chosen, row.rejected)]
    assert sum(length > 300 for length in responses) >= 5
    assert max(len(row.prompt) + max(len(row.chosen), len(row.rejected)) + 1 for row in rows) <= bench_data.MAX_LENGTH
    assert bench_data.make_rows(100, shape, seed=0) == rows[:100]
    assert bench_data.make_rows(100, shape, seed=1) != rows[:100]


def test_rows_are_read_as_pairs_of_which_the_chosen_one_is_known(tmp_path: Path) -> None:
    rows = bench_data.write_data(tmp_path / "data", 50, bench_data.SHAPES["7M"])
    splits = saferlhf.open_saferlhf(str(tmp_path / "data"), None, str(tmp_path / "cache"))
    assert splits["test"].num_rows == bench_data.TEST_ROWS
    pairs = saferlhf.group_saferlhf_pairs(saferlhf.select_saferlhf_columns(splits["train"], "data"))
    assert [found["sft_target"].split() for found in pairs.values()] == [row.chosen for row in rows]
    assert [found["responses"][1].split() for found in pairs.values()] == [row.rejected for row in rows]
    counted = [len(prompt.split()) + len(found["sft_target"].split()) + 1 for prompt, found in pairs.items()]
    assert counted == [row.sft_tokens for row in rows]


def test_table_takes_ratios_by_the_first_variant_and_fits_100_columns() -> None:
    runs = {
        "upstream": [{"tokens/s": 100.0}, {"tokens/s": 200.0}],
        "sorted": [{"tokens/s": 150.0}, {"tokens/s": 400.0}],
    }
    lines = bench_train.table(runs).splitlines()
    assert lines[1].split() == ["tokens/s", "upstream", "150.00", "100.00", "200.00"]
    assert lines[2].split() == ["sorted", "275.00", "150.00", "400.00", "1.750,", "1.500", "to", "2.000"]
    assert max(map(len, lines)) <= 100


def test_variants_of_this_project_are_named_on_the_command_line() -> None:
    assert bench_train.named_overrides("x:a=1,b=[c,d],e.f=g") == ("x", ["a=1", "b=[c,d]", "e.f=g"])
    for wrong in ("a=1", "trl:a=1", "x:", "../x:a=1"):
        with pytest.raises(argparse.ArgumentTypeError):
            bench_train.named_overrides(wrong)


def test_bench_lists_what_it_runs_and_refuses_other_names() -> None:
    bench = ROOT / "scripts/bench"
    listed = subprocess.run([sys.executable, bench], capture_output=True, text=True, check=True).stdout
    there = {path.stem.removeprefix("bench_") for path in bench.parent.glob("bench_*.py")} - {"data", "runs", "trl"}
    assert {line.split()[0] for line in listed.splitlines() if line.startswith("  ")} == there
    refused = subprocess.run([sys.executable, bench, "nothing"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "no benchmark 'nothing'" in refused.stderr
    passed_on = subprocess.run([sys.executable, bench, "log", "--help"], capture_output=True, text=True, check=True)
    assert "--lines" in passed_on.stdout


def test_shapes_have_as_many_parameters_as_the_models_made_of_them() -> None:
    """As `model.parameters()` counts those that were built."""
    assert {name: bench_data.SHAPES[name].parameters for name in ("7M", "60M")} == {"7M": 7_358_720, "60M": 58_073_600}
    assert bench_data.SHAPES["6.7B"].parameters == pytest.approx(6.74e9, rel=1e-3), "AmberChat's"


def test_operations_are_six_a_parameter_and_token_and_those_of_attention() -> None:
    shape = bench_data.Shape(hidden=8, layers=2, heads=2, ffn=16, vocabulary=100)
    assert shape.operations(tokens=10, length=0) == 10 * 6 * (shape.parameters - 800)
    assert shape.operations(tokens=10, length=5) - shape.operations(tokens=10, length=0) == 10 * 6 * 2 * 8 * 5
