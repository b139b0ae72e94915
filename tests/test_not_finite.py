"""Numbers that are not finite: nothing is kept for them, nothing goes on from them, nothing is made of them."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import load, only_run, run_ambersafe
from test_lora import given, train  # noqa: F401, a fixture
from test_real_upstream import mend, model, rows  # noqa: F401, fixtures

from ambersafe_cli import integrity

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(given: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A working folder with a short SFT run of all weights, one with an adapter, and their checkpoints."""
    work = tmp_path_factory.mktemp("whole")
    train(work, "sft", *given, "--keep", "all", "--exp-name", "full")
    train(work, "sft", *given, "--keep", "all", "--lora", "--exp-name", "adapter")
    return work


def spoil(run: Path, name: str) -> None:
    """Make one number of a checkpoint no number, in a file that is whole otherwise."""
    import torch
    from safetensors.torch import load_file, save_file

    path = run / name / "policy.pt"
    saved: Any = load(path)
    if (adapter := path.with_name("adapter_model.safetensors")).exists():
        tensors = load_file(adapter)
        next(iter(tensors.values())).view(-1)[3] = float("inf")
        save_file(tensors, adapter, metadata={"format": "pt"})
        saved["adapter"]["sha256"][adapter.name] = hashlib.sha256(adapter.read_bytes()).hexdigest()
        torch.save(saved, path)
        return
    saved["state"]["model.layers.1.mlp.up_proj.weight"][2, 5] = float("nan")
    torch.save(saved, path)


@pytest.mark.parametrize("when", [48, "last"])
def test_an_evaluation_that_is_not_finite_ends_the_run_before_it_is_saved(
    given: tuple[object, ...],  # noqa: F811
    patched: Path,
    tmp_path: Path,
    when: int | str,
) -> None:
    """Weights that the loss of the next batch would tell of too late."""
    clone = shutil.copytree(patched, tmp_path / "clone")
    line = "                mean_eval_metrics = {k: sum(v) / len(v) for k, v in all_eval_metrics.items()}\n"
    condition = "batch is None" if when == "last" else f"self.example_counter == {when}"
    spoiled = f"                mean_eval_metrics['loss/eval'] = float('nan') if {condition} else 1.0\n"
    mend(clone / "trainers.py", line, line + spoiled)
    flags = ("--dir", clone, "--allow-modified", "--keep", "1", "--keep-best", "loss/eval", "save_every_examples=16")
    done = run_ambersafe("sft", *given[2:], *flags, "--exp-name", "run", cwd=tmp_path)
    assert done.returncode == 1
    run = only_run(tmp_path, "run")
    assert re.search(r"the evaluation after \d+ examples is not finite, and nothing is saved", done.stderr)
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert not (run / "LATEST").exists()
    assert "next: " not in done.stderr
    steps = sorted(int(path.name[len("step-") :]) for path in run.glob("step-*"))
    assert steps, "those before it stay"
    assert 48 not in steps or when == "last"


def test_a_checkpoint_whose_metric_is_no_number_is_not_the_best(patched: Path, tmp_path: Path) -> None:
    from test_speed import ask

    for step, value in ((16, "0.5"), (32, "NaN"), (48, "0.7"), (64, "Infinity")):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "metrics.json").write_text(f'{{"loss/eval": {value}}}')
    code = f"""
made = trainer(keep_checkpoints=1, keep_best="loss/eval")
made.run_dir = {str(tmp_path)!r}
made.prune_checkpoints()
print("0")
"""
    ask(patched, tmp_path, code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-16", "step-64"]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_what_is_not_finite_is_neither_trained_from_nor_exported_nor_sampled(
    whole: Path,
    given: tuple[object, ...],  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    shutil.copytree(whole, tmp_path / "work")
    work = tmp_path / "work"
    run = only_run(work, kind)
    spoil(run, "LATEST")
    for command in (
        ("dpo", *given, "--archive", run, "--no-preflight", *(("--lora",) if kind == "adapter" else ())),
        ("check", "dpo", *given, "--archive", run, *(("--lora",) if kind == "adapter" else ())),
        ("export", run, "--out", tmp_path / "exported"),
        ("sample", run, "--max-new-tokens", "2"),
        ("evaluate", run),
    ):
        done = run_ambersafe(*command, cwd=work)
        assert done.returncode != 0, command
        assert "not finite" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr or command[0] == "dpo", "train.py's own"
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_resume_passes_over_a_checkpoint_whose_weights_are_not_finite(whole: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(whole, tmp_path / "work")
    run = only_run(tmp_path / "work", kind)
    newest = max(run.glob("step-*"), key=lambda path: int(path.name[len("step-") :]))
    spoil(run, newest.name)
    shutil.rmtree(run / "LATEST")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "failed", "exit_status": 1}))
    done = run_ambersafe("resume", run, cwd=tmp_path / "work")
    assert done.returncode == 0, done.stderr
    said = (
        f"{newest} is not whole, and is kept as {newest.name}.damaged: policy.pt: it holds weights that are not finite"
    )
    assert said in " ".join(done.stderr.split())
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    assert integrity.damage(run / "LATEST" / "policy.pt") is None
