"""`ambersafe runs` and `ambersafe show`: runs by name, what is said of them, and records of any kind."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Ambersafe, only_run
from hypothesis import given, settings
from hypothesis import strategies as st

from ambersafe_cli import patches, runs, show
from ambersafe_cli.errors import RunFolderError, UsageError

Train = Any


@pytest.fixture
def train(ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path) -> Train:
    """Run a stage with tests/fake_train.py, and return its folder."""
    (tmp_path / "model").mkdir()

    def run(name: str, stage: str = "sft", *given: object, fake: str = "train") -> Path:
        flags = ("--model", tmp_path / "model", "--no-preflight", "--exp-name", name)
        ambersafe(stage, *flags, *given, env={"FAKE": fake})
        return only_run(fake_clone.parent, name)

    return run


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_show_says_what_was_run_how_it_went_and_what_comes_next(ambersafe: Ambersafe, train: Train) -> None:
    sft = train("first", "sft", "--lr", "0.5", "warmup_steps=7")
    shown = ambersafe("show")
    assert shown.returncode == 0, shown.stderr
    said = " ".join(shown.stdout.split())
    for part in (
        f"{sft.name}: sft, finished {sft} model",
        "model at aaaaaaaaaaaa",
        "at bbbbbbbbbbbb",
        "lr=0.5",
        "warmup_steps=7",
        "exit status 0",
        "LATEST/policy.pt, the final weights",
        "loss 1.25",
        "preflight left away",
        f"0 of {len(patches.read_series())} patches",
        "torch",
        f"next: ambersafe dpo --archive {sft}/LATEST/policy.pt",
    ):
        assert part in said, part
    dpo = train("second", "dpo")
    assert f"from        the SFT run {sft.name}" in ambersafe("show").stdout
    answer = json.loads(ambersafe("show", "--json").stdout)
    record = json.loads((dpo / "run.json").read_text())
    assert answer == {"folder": str(dpo), **record, "status": "finished"}
    failed = train("third", "sft", fake="crash")
    shown = ambersafe("show", failed.name)
    assert f"{failed.name}: sft, failed" in shown.stdout
    assert "exit status 3" in shown.stdout
    assert f"next: ambersafe resume {failed.name}" in shown.stdout


def test_a_run_is_found_by_folder_name_or_beginning_and_near_names_are_told(
    ambersafe: Ambersafe, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = train("alpha_one"), train("alpha_two")
    work = one.parents[2]
    (work / "alpha_one").mkdir()  # in the way of nothing: it is not a run
    monkeypatch.chdir(work)
    for text in (one.name, str(one), f"{one}/", os.path.relpath(one), "alpha_one", one.name[:-3]):
        assert runs.find(text) == one, text
    monkeypatch.chdir(one)
    assert runs.find(".") == one
    monkeypatch.chdir(work)
    for text, told in (("alpha", "2 runs begin with alpha"), ("alpha_tow", "There is no run alpha_tow")):
        with pytest.raises(UsageError) as raised:
            runs.find(text)
        assert told in raised.value.message
        assert other.name in raised.value.hint
    with pytest.raises(UsageError, match="is not the folder of a run"):
        runs.find("direct-preference-optimization")
    resumed = ambersafe("resume", "alpha_two")
    assert resumed.returncode == 64
    assert f"{other} has finished" in resumed.stderr


def test_a_run_whose_process_has_gone_has_died_and_shows_its_last_evaluation(
    ambersafe: Ambersafe, train: Train, fake_clone: Path
) -> None:
    command = [sys.executable, "-m", "ambersafe_cli", "sft", "--no-preflight", "--model", str(fake_clone.parent)]
    child = subprocess.Popen(
        command, cwd=fake_clone.parent, env={**os.environ, "FAKE": "hang"}, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout
    line = next(line for line in child.stdout if line.startswith("started"))
    worker = int(line.split()[1])
    try:
        (run,) = fake_clone.parent.glob(".cache/*/*/")
        assert f"{run.name}: sft, running" in ambersafe("show").stdout
        assert "it is running" in ambersafe("show").stdout
    finally:
        child.kill()
        child.wait()
        os.kill(worker, signal.SIGKILL)
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if str(run).encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
    with (run / "train.log").open("a") as log:
        log.write("eval after 32: {'loss/eval': '0.75', 'rewards_eval/accuracies': '0.875'}\n")
    shown = ambersafe("show").stdout
    assert f"{run.name}: sft, died" in shown
    assert "held out    loss 0.75, rewards/accuracies 0.875" in shown
    assert f"next: ambersafe resume {run.name}" in shown
    assert json.loads(ambersafe("show", "--json").stdout)["status"] == "died"
    listed = ambersafe("runs").stdout
    assert "died" in listed
    assert "0.75" in listed
    assert "0.875" in listed


def test_runs_and_show_keep_to_80_columns(ambersafe: Ambersafe, train: Train) -> None:
    for name in ("saferlhf_sft_ambersafe", "short"):
        train(name)
    listed = ambersafe("runs").stdout
    assert widest(listed) <= 80
    work = Path(listed.replace("\n", "").partition(".cache")[0])  # the path may be folded
    name = only_run(work, "saferlhf_sft_ambersafe").name
    beginning = next(line.split()[0] for line in listed.splitlines() if "saferlhf" in line)
    assert name.startswith(beginning)
    shown = ambersafe("show", beginning)
    assert shown.stdout.startswith(name), "what a folded name begins with is enough"
    facts = shown.stdout.partition("\n\n")[2].partition("\n\nnext:")[0]
    assert all(len(line) <= 80 for line in facts.splitlines() if "/" not in line), facts


def test_checkpoints_are_named_with_the_best_one(ambersafe: Ambersafe, train: Train) -> None:
    run = train("run", "sft", "--keep-best", "loss/eval")
    for step, loss in ((16, 2.0), (32, 1.0), (112, 1.5)):
        (run / f"step-{step}").mkdir()
        (run / f"step-{step}" / "metrics.json").write_text(json.dumps({"loss/eval": loss}))
    (run / "step-48").mkdir()
    (run / "step-48" / "metrics.json").write_text("{")
    shown = [line.strip() for line in ambersafe("show").stdout.splitlines()]
    start = shown.index("checkpoint  LATEST/policy.pt, the final weights")
    assert shown[start + 1 : start + 5] == ["step-112", "step-48", "step-32, the best by loss/eval: 1", "step-16"]


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("2026-11-23T08:07:00+00:00"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def mapping(*keys: str, more: dict[str, Any] | None = None) -> st.SearchStrategy[Any]:
    """A mapping with some of these keys and any values, or those of `more`."""
    return st.fixed_dictionaries({}, optional={**dict.fromkeys(keys, any_json), **(more or {})})


words = st.lists(st.sampled_from(["python", "a b", "x=1"]), min_size=1, max_size=3)
keep_best = st.sampled_from(["keep_best=loss/eval", "keep_best=[", "~", "lr=1"])
records = st.fixed_dictionaries(
    {
        "schema": st.just(1),
        "stage": st.sampled_from(["sft", "dpo"]) | st.text(),
        "status": st.sampled_from(["running", "finished", "failed", "interrupted"]) | st.text(),
        "started": st.text(),
        "model": st.fixed_dictionaries(
            {"name": st.text(), "revision": st.none() | st.text()}, optional={"commit": any_json}
        ),
        "attempts": st.lists(mapping("started", "ended", "host", "exit_status", "pid"), max_size=3),
        "command": words,
        "next_command": words,
        "environment": st.just({}),
        "data": mapping(
            "name",
            "revision",
            "commit",
            more={
                "counts": mapping(more={split: mapping("rows", "prompts", "pairs") for split in ("train", "test")}),
                "fingerprint": mapping("train", "test"),
            },
        ),
        "upstream": st.fixed_dictionaries(
            {"folder": st.just("/clone"), "head": st.text(), "edited": st.lists(any_json), "can_resume": st.booleans()},
            optional=dict.fromkeys(("base", "on_top", "patches", "series"), any_json),
        ),
    },
    optional={
        "ended": st.none() | st.text(),
        "exit_status": any_json,
        "sft_run": any_json,
        "archive": any_json,
        "archive_fingerprint": any_json,
        "checkpoint_fingerprint": any_json,
        "recipe": mapping("source", more={"values": mapping(more={"sft": any_json, "dpo": mapping("lr")})}),
        "values": mapping("lr", "model.archive", more={"keep_best": st.just("loss/eval") | any_json}),
        "overrides": st.lists(keep_best | any_json, max_size=3),
        "last_metrics": mapping("loss/eval", "rewards_eval/accuracies"),
        "preflight": st.lists(mapping("level", "what") | any_json, max_size=3) | any_json,
        "python": mapping("version", "packages", "gpus"),
        "machine": mapping("system", "machine", "cpus"),
        "variables": mapping("LANG"),
        "working_folder_git": mapping("commit", "branch", "changed", "changed_files"),
    },
)


KEYS = ("stage", "ended", "data", "recipe", "values", "overrides", "attempts", "last_metrics", "upstream", "python")


@settings(deadline=None)
@given(records, st.dictionaries(st.sampled_from(KEYS), any_json, max_size=1))
def test_no_record_that_can_be_read_is_fatal(record: dict[str, Any], other: dict[str, Any]) -> None:
    record = {**record, **other}
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        folder = runs.folder_of_runs() / "run"
        (folder / "LATEST").mkdir(parents=True)
        (folder / "LATEST" / "policy.pt").touch()
        for step in ("step-16", "step-32"):
            (folder / step).mkdir()
            (folder / step / "metrics.json").write_text(json.dumps(record.get("last_metrics")))
        (folder / "run.json").write_text(json.dumps(record))
        is_read = runs.read_or_warn(folder) is not None
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
        with contextlib.redirect_stdout(stdout):
            show.table(as_json=False)
            show.table(as_json=True)
            for as_json in (False, True):
                if is_read:
                    show.run(None, as_json)
                else:
                    with pytest.raises(RunFolderError):
                        show.run("run", as_json)
