"""Folders that somebody else prepared: links where we write, pipes where we read, headers and lines without end."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run_ambersafe
from made_runs import as_log, recorded, records

from ambersafe_cli import checkpoints, child, files, journal, locks, metrics, provenance, recovery, runs
from ambersafe_cli.errors import RunFolderError, UsageError


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "bashrc"
    path.write_text("mine\n")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that somebody else made: it lies where its name is found from the working folder `tmp_path`."""
    return recorded(tmp_path / ".cache" / runs.user_name() / "run", "dpo", records("dpo", 40))


def link(place: Path, victim: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(victim)


# --- links ---


@pytest.mark.parametrize(
    ("command", "planted"),
    [
        (("report", "run"), ".report.html.new"),
        (("plot", "run"), "plots/.dpo.png.new"),
        (("plot", "run"), "plots/.dpo.svg.new"),
        (("plot", "run", "--tensorboard"), "tensorboard/.events.new"),
    ],
)
def test_what_is_drawn_is_not_written_through_a_link(
    command: tuple[str, ...], planted: str, run: Path, victim: Path, tmp_path: Path
) -> None:
    link(run / planted, victim)
    done = run_ambersafe(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert victim.read_text() == "mine\n"
    assert not os.path.lexists(run / planted)


@pytest.mark.parametrize("to_folder", [True, False])
@pytest.mark.parametrize(
    ("command", "planted"),
    [
        (("report", "run"), "report.html"),
        (("plot", "run"), "plots"),
        (("plot", "run", "--tensorboard"), "tensorboard"),
    ],
)
def test_a_link_in_the_place_of_what_is_drawn_is_refused(
    command: tuple[str, ...], planted: str, to_folder: bool, run: Path, victim: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    link(run / planted, tmp_path / "mine" if to_folder else victim)
    done = run_ambersafe(*command, cwd=tmp_path)
    assert done.returncode == 74, done.stderr
    assert "is a link" in done.stderr
    assert victim.read_text() == "mine\n"
    assert not list((tmp_path / "mine").iterdir())


def test_no_name_that_is_written_first_is_written_through_a_link(
    run: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    link(run / "run.json.00000000.new", victim)
    runs.write(run, runs.read(run) or {})
    assert not (run / "run.json.00000000.new").is_symlink()
    link(run / f"evaluation.json.{os.getpid()}.new", victim)
    files.write_json(run / "evaluation.json", {})
    assert victim.read_text() == "mine\n"
    assert not (run / "run.json").is_symlink()


@pytest.mark.parametrize("is_hard", [False, True])
def test_nothing_is_appended_through_a_link(is_hard: bool, run: Path, victim: Path) -> None:
    for name in ("train.log", journal.FILE, locks.FILE, "stop"):
        (run / name).unlink(missing_ok=True)
        (run / name).hardlink_to(victim) if is_hard else (run / name).symlink_to(victim)
    with pytest.raises(RunFolderError):
        metrics.begin_attempt(run / "train.log", 2)
    journal.Journal(run, 1).take("train stats after 16 examples: {'loss/train': '2'}")
    if not is_hard:
        with pytest.raises(RunFolderError), locks.locked(run):
            pass
        with pytest.raises(RunFolderError):
            locks.ask_to_stop(run)
    assert victim.read_text() == "mine\n"


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "hydra", "hydra/.hydra", "anything", "step-16.pt"])
def test_a_run_with_a_link_in_it_does_not_go_on(name: str, run: Path, victim: Path) -> None:
    link(run / name, victim)
    with pytest.raises(RunFolderError, match="is a link to"):
        recovery.put_in_order(run)


def test_a_checkpoint_on_another_disk_may_be_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run / "LATEST").symlink_to(tmp_path / "elsewhere")
    assert recovery.put_in_order(run) is None


# --- pipes, headers and lines ---


@pytest.mark.parametrize("name", ["run.json", "train.log", "metrics.jsonl", "config.yaml", "LATEST/metrics.json"])
@pytest.mark.parametrize("command", ["show", "watch", "report", "runs"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(command: str, name: str, run: Path, tmp_path: Path) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).parent.mkdir(exist_ok=True)
    os.mkfifo(run / name)
    done = run_ambersafe(command, *(() if command == "runs" else ("run",)), cwd=tmp_path, timeout=60)
    assert "Traceback" not in done.stderr
    assert "defect" not in done.stderr


def test_a_header_of_any_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((4_800_000_000).to_bytes(8, "little"))
        file.truncate(5_000_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="a header of 4800000000"):
        checkpoints.safetensors_entries(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


PEAK = """
import json, resource, sys
from pathlib import Path
from ambersafe_cli import journal, metrics, watch
log = metrics.read_log(Path(sys.argv[1]))
tail = watch.Tail(Path(sys.argv[1]), 10**9)
while tail.new():
    pass
entries = sum(1 for _ in journal.Follower(Path(sys.argv[1])).new())
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, log.last_step.examples]))
"""


def test_a_line_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    peaks = []
    for length in (0, 300_000_000):
        log = tmp_path / f"{length}.log"
        with log.open("w") as file:
            for _ in range(length // 1_000_000):
                file.write("x" * 1_000_000)
            file.write("\n" + as_log(records("sft", 4)))
        done = subprocess.run([sys.executable, "-c", PEAK, log], capture_output=True, text=True, check=True)
        peak, examples = json.loads(done.stdout)
        peaks.append(peak)
        assert examples == 64
    assert peaks[1] - peaks[0] < 50_000, peaks  # KiB


def test_output_without_an_end_of_line_is_kept_in_pieces(tmp_path: Path) -> None:
    """Or each further piece would cost as much as all before it."""
    path = tmp_path / "output"
    path.write_bytes(b"x" * 10_000_000)
    written: list[int] = []
    with path.open("rb") as source:
        child._pump(source, None, lambda data: written.append(len(data)))
    assert sum(written) == 10_000_001
    assert max(written) <= files.LONGEST_LINE + 65536


def test_only_the_newest_damaged_checkpoint_is_kept(run: Path) -> None:
    for name in ("step-16.damaged", "step-32.damaged"):
        (run / name).mkdir()
    assert recovery.put_in_order(run) is None
    assert len(list(run.glob("*.damaged"))) == 2, "there is no newer one"
    (run / "step-48").mkdir()
    assert recovery.put_in_order(run) is None
    assert [path.name for path in run.glob("*.damaged*")] == ["step-48.damaged"]


# --- what is kept of a secret ---


@pytest.mark.parametrize(
    "settings",
    [
        {"wandb.key": "0123456789abcdef"},
        {"note": "glpat-0123456789abcdefghij"},
        {"note": "xoxb-0123456789-abcdef"},
        {"note": "https://0123456789abcdef0123@example.org/a"},
        {"note": "https://example.org/a?private_token=0123456789"},
        {"note": "https://me:password@example.org/a"},
    ],
)
def test_a_secret_is_not_kept(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="looks like a secret"):
        provenance.require_no_secret(settings.items())


@pytest.mark.parametrize(
    "option", ["--export=ALL,HF_TOKEN=abc", "--export ALL,HF_TOKEN=abc", "--comment=hf_" + "a" * 30]
)
def test_a_secret_is_not_given_to_slurm(option: str) -> None:
    with pytest.raises(UsageError, match="looks like a secret"):
        provenance.require_no_secret_for_slurm([option])


# --- what is shown ---

EVIL = "\x1b]0;title\x07\x1b[2J\x1b[31mred\u202e\r\x9b31m\u061c\u200b"


KEPT = ("status", "folder", "stage", "head")


def spoil(value: Any) -> Any:
    """Every text of a record with what a terminal takes for commands behind it, but for what a record must have."""
    if isinstance(value, dict):
        return {key: each if key in KEPT else spoil(each) for key, each in value.items()}
    if isinstance(value, list):
        return [value[0], *map(spoil, value[1:])] if value[:1] == ["ambersafe"] else [spoil(each) for each in value]
    return value + EVIL if isinstance(value, str) and not re.match(r"\d{4}-", value) else value


@pytest.mark.parametrize(
    ("command", "status", "is_shown"),
    [
        (("show", "run"), "finished", True), (("runs",), "finished", False), (("watch", "run"), "finished", True),
        (("report", "run"), "finished", False), (("plot", "run"), "finished", False),
        (("resume", "run"), "interrupted", True), (("reproduce", "run"), "finished", True),
        (("show", "run", "--json"), "finished", True), (("watch", "run", "--plain"), "finished", True),
        (("stop", "run"), "finished", False), (("sample", "run"), "finished", False),
        (("export", "run", "--model", f"x{EVIL}"), "finished", False), (("show", f"no{EVIL}"), "finished", True),
        (("show", "--debug", f"no{EVIL}"), "finished", True),
    ],
)  # fmt: skip
def test_nothing_that_a_record_or_a_log_holds_is_a_command_to_the_terminal(
    command: tuple[str, ...], status: str, is_shown: bool, run: Path, tmp_path: Path
) -> None:
    record = json.loads((run / "run.json").read_text())
    more = {"recipe": {"source": "x"}, "values": {"exp_name": "x"}, "archive": "/x", "sft_run": "/x", "overrides": []}
    more |= {"python": {"path": "p", "version": "v"}, "status": status}
    spoilt = spoil({**record, **more})
    spoilt["upstream"]["folder"] += EVIL
    (run / "run.json").write_text(json.dumps(spoilt))
    (run / "train.log").write_text(as_log(records("dpo", 3)) + EVIL + "\n")
    done = run_ambersafe(*command, cwd=tmp_path)
    for said in (done.stdout, done.stderr):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u202a-\u202e\u2066-\u2069]", said), said
    assert "malformed" not in done.stderr
    if is_shown:  # it came so far, and shows it
        assert re.search(r"\\(x1b|u001b)", done.stdout + done.stderr), done.stdout + done.stderr
    assert "defect" not in done.stderr, done.stderr
    assert "--debug" in command or "Traceback" not in done.stderr
