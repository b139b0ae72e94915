"""`ambersafe prefetch` and what preflight says of the cache, with a stand-in for the hub; then training without it."""

import errno
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import only_run, run_ambersafe
from fake_hub import FakeHub, Files, commit_of, serve
from hypothesis import given
from hypothesis import strategies as st
from test_preflight import rows
from test_real_upstream import model  # noqa: F401, a fixture

from ambersafe_cli import fetching, hub

pytestmark = pytest.mark.slow

GIVEN = ("--recipe", "tiny", "--model", "org/tiny", "--data", "org/MyRows")
AT_V0 = (*GIVEN, "--model-revision", "v0", "--data-revision", "v0")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_shards(model: Path, folder: Path) -> dict[str, bytes]:  # noqa: F811
    """The same model in several files of weights and their index, and its tokenizer."""
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="1MB")
    tokenizer = {name: content for name, content in contents(model).items() if name.startswith("tokenizer")}
    return {**contents(folder), **tokenizer}


def dataset(title: str) -> dict[str, bytes]:
    """A repository of preference rows; those of another title differ in every prompt."""
    parts = {"train": rows(64), "test": rows(48)}
    lines = {
        split: "".join(json.dumps({**row, "prompt": f"{title}: {row['prompt']}"}) + "\n" for row in part)
        for split, part in parts.items()
    }
    return {"README.md": f"# {title}\n".encode(), **{f"{s}.jsonl": text.encode() for s, text in lines.items()}}


@pytest.fixture(scope="module")
def repositories(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Files]]:  # noqa: F811
    whole, shards = contents(model), in_shards(model, tmp_path_factory.mktemp("shards"))
    not_read = {"pytorch_model.bin": b"x" * 999, "onnx/model.onnx": b"x" * 999, "model.gguf": b"x", "train.py": b"x"}
    return {
        "models/org/tiny": {"main": {**whole, "main.txt": b"main"}, "v0": {**shards, **not_read}},
        "datasets/org/MyRows": {"main": dataset("main"), "v0": dataset("v0")},
    }


@pytest.fixture
def fake(repositories: dict[str, dict[str, Files]]) -> Iterator[FakeHub]:
    with serve(FakeHub({key: dict(revisions) for key, revisions in repositories.items()})) as running:
        yield running


Prefetch = Callable[..., subprocess.CompletedProcess[str]]


def surroundings(home: Path, url: str) -> dict[str, str]:
    return {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}


@pytest.fixture
def prefetch(fake: FakeHub, tmp_path: Path) -> Prefetch:
    """Run the command with a cache of its own, `tmp_path / "home"`."""
    return lambda *arguments: run_ambersafe(
        "prefetch", *arguments, cwd=tmp_path, env=surroundings(tmp_path / "home", fake.url)
    )


@pytest.fixture(scope="module")
def filled(repositories: dict[str, dict[str, Files]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds v0 of both, and a hub that is gone. Not to be changed."""
    home = tmp_path_factory.mktemp("filled")
    with serve(FakeHub(dict(repositories))) as running:
        done = run_ambersafe("prefetch", *AT_V0, cwd=home, env=surroundings(home, running.url))
    assert done.returncode == 0, done.stderr
    return home


def check(patched: Path, home: Path, *given: object, **env: str) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **env}
    return run_ambersafe("check", "sft", "--dir", patched, *given, cwd=home, env=offline)


def one_message(done: subprocess.CompletedProcess[str]) -> str:
    """What is behind the only `error:` of a command that ended with the status of the hub's errors."""
    assert done.returncode == 77, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1, done.stderr
    return done.stderr.partition("error:")[2]


# --- what was fetched is all that it takes ---


def test_what_was_fetched_trains_without_a_network_by_the_command_that_was_printed(
    prefetch: Prefetch, fake: FakeHub, patched: Path, tmp_path: Path
) -> None:
    done = prefetch(*AT_V0, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    commits = {key: commit_of(revisions["v0"]) for key, revisions in fake.repositories.items()}
    assert [each["commit"] for each in answer["fetched"]] == list(commits.values())
    for each in answer["fetched"]:
        files = [path for path in Path(each["folder"]).iterdir() if path.is_file()]
        assert (each["files"], each["bytes"]) == (len(files), sum(path.stat().st_size for path in files))
    sent = {Path(path).name for path in fake.fetched() if path.startswith("/org/tiny/")}
    assert "model.safetensors.index.json" in sent
    assert len([name for name in sent if name.endswith(".safetensors")]) > 1
    assert not sent & {"pytorch_model.bin", "model.onnx", "model.gguf", "train.py"}
    fake.closes_connections = True

    checked = check(patched, tmp_path / "home", *AT_V0)
    assert checked.returncode == 0, checked.stderr
    assert "cache" not in checked.stderr

    words = shlex.split(answer["commands"][0])
    settings = dict(word.split("=", 1) for word in words[: words.index("ambersafe")])
    assert settings == {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = words[words.index("ambersafe") + 1 :]
    trained = run_ambersafe(*command, "--dir", patched, "--epochs", "1", cwd=tmp_path, env=settings, timeout=300)
    assert trained.returncode == 0, trained.stderr
    log = (only_run(tmp_path, "tiny_sft") / "train.log").read_text()
    assert f"resolved model org/tiny to revision {commits['models/org/tiny']}" in log
    assert f"resolved dataset org/MyRows to revision {commits['datasets/org/MyRows']}" in log


def test_going_from_one_revision_to_another_and_back_fetches_nothing_twice(
    prefetch: Prefetch, fake: FakeHub, patched: Path, tmp_path: Path
) -> None:
    for arguments in (AT_V0, GIVEN):
        assert prefetch(*arguments).returncode == 0
    done = check(patched, tmp_path / "home", *AT_V0)
    newest = commit_of(fake.repositories["datasets/org/MyRows"]["main"])
    assert done.returncode == 76
    assert f"lacks its rows as those loaded last, which are of commit {newest}" in done.stderr
    assert check(patched, tmp_path / "home", *GIVEN).returncode == 0
    fake.requests.clear()
    assert prefetch(*AT_V0).returncode == 0
    assert not fake.fetched()
    assert check(patched, tmp_path / "home", *AT_V0).returncode == 0


def test_a_fetch_that_was_cut_off_leaves_what_there_was(prefetch: Prefetch, fake: FakeHub, tmp_path: Path) -> None:
    assert prefetch(*GIVEN).returncode == 0
    old = commit_of(fake.repositories["models/org/tiny"]["main"])
    newer = {**fake.repositories["models/org/tiny"]["main"], "model.safetensors": b"new" * 10**5}
    fake.repositories["models/org/tiny"] = {"main": newer}
    fake.cut = lambda name, start: 0 if name == "model.safetensors" else None
    assert "Cannot fetch the model org/tiny" in one_message(prefetch(*GIVEN))
    assert (tmp_path / "home/hub/models--org--tiny/refs/main").read_text() == old


def test_a_download_that_is_cut_off_once_goes_on_where_it_was(prefetch: Prefetch, fake: FakeHub) -> None:
    large = {**fake.repositories["models/org/tiny"]["main"], "words.txt": bytes(12 * 2**20)}
    fake.repositories["models/org/tiny"] = {"main": large}
    starts = []

    def cut(name: str, start: int) -> int | None:
        if name != "words.txt":
            return None
        starts.append(start)
        return 11 * 2**20 if len(starts) == 1 else None

    fake.cut = cut
    assert prefetch(*GIVEN).returncode == 0
    assert starts == [0, 10 * 2**20], "huggingface_hub writes 10 MiB at a time"


def test_ctrl_c_ends_a_fetch_in_the_middle_of_a_file(fake: FakeHub, tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def block(name: str, start: int) -> None:
        if name == "model.safetensors":
            reached.set()
            go_on.wait(timeout=300)

    fake.cut = block
    env = {**os.environ, **surroundings(tmp_path, fake.url), "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    command = [sys.executable, "-m", "ambersafe_cli", "prefetch", *GIVEN]
    child = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert reached.wait(timeout=120)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=120)
    finally:
        go_on.set()
        child.kill()
    assert child.returncode == 130
    assert "Traceback" not in said


def test_local_paths_need_no_network(model: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(64)))
    given = ("--recipe", "tiny", "--model", model, "--data", "rows.jsonl")
    env = surroundings(tmp_path / "home", "http://127.0.0.1:9")
    done = run_ambersafe("prefetch", *given, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a local path, nothing to fetch") == 3
    assert f"HF_HUB_OFFLINE=1 ambersafe dpo --recipe tiny --model {model}" in done.stdout
    assert not (tmp_path / "home").exists()


def test_a_tokenizer_with_a_name_of_its_own_is_fetched_at_main(
    prefetch: Prefetch, fake: FakeHub, patched: Path, tmp_path: Path
) -> None:
    files = fake.repositories["models/org/tiny"]["main"]
    tokenizer = {name: content for name, content in files.items() if name.startswith("tokenizer")}
    fake.repositories["models/org/words"] = {"main": tokenizer}
    given = (*AT_V0, "model.tokenizer_name_or_path=org/words")
    done = prefetch(*given)
    assert done.returncode == 0, done.stderr
    assert f"tokenizer org/words at main\n  commit {commit_of(tokenizer)}, 2 files" in done.stdout
    assert "model.tokenizer_name_or_path=org/words" in done.stdout
    checked = check(patched, tmp_path / "home", *given)
    assert checked.returncode == 0, checked.stderr


# --- what preflight says of the cache ---


@pytest.mark.cold  # the command would name the interpreter
def test_each_part_that_is_missing_is_named_with_the_command_that_fetches_it(patched: Path, tmp_path: Path) -> None:
    done = check(patched, tmp_path, *AT_V0)
    assert done.returncode == 76
    for part in ("model org/tiny at v0", "tokenizer of org/tiny at v0", "data org/MyRows at v0"):
        assert f"The {part} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set." in done.stderr
    command = (
        "ambersafe prefetch --recipe tiny --model org/tiny --model-revision v0 --data org/MyRows --data-revision v0"
    )
    assert done.stderr.count(f"`{command}`") == 3
    assert "Cannot read" not in done.stderr, "no raw message of `datasets`"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("hub/models--org--tiny/snapshots/*/model-00002-of-*", "lacks model-00002-of-0"),
        ("hub/models--org--tiny/snapshots/*/tokenizer*", "The tokenizer of org/tiny at v0 is not whole"),
        ("hub/models--org--tiny/snapshots/*/*.safetensors*", "lacks model.safetensors"),
        ("hub/models--org--tiny/snapshots/*/config.json", "lacks config.json"),
        ("datasets/org___my_rows", "The data org/MyRows at v0 is not in the Hugging Face cache"),
        ("hub/datasets--org--MyRows/refs/v0", "lacks the README.md by which the commit of v0 is known"),
    ],
)
def test_what_a_cache_lacks_is_named(filled: Path, patched: Path, tmp_path: Path, pattern: str, message: str) -> None:
    shutil.copytree(filled, tmp_path / "home", symlinks=True)
    (found, *more) = (tmp_path / "home").glob(pattern)
    for path in (found, *more):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = check(patched, tmp_path / "home", *AT_V0)
    assert done.returncode == 76
    assert message in done.stderr
    assert done.stderr.count("HF_HUB_OFFLINE is set") == 1
    assert "Traceback" not in done.stderr


def test_with_a_network_what_is_missing_is_a_warning(fake: FakeHub, patched: Path, tmp_path: Path) -> None:
    env = surroundings(tmp_path / "home", fake.url)
    done = run_ambersafe("check", "sft", "--dir", patched, *GIVEN, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    for part in ("model org/tiny", "tokenizer of org/tiny", "data org/MyRows"):
        assert f"warning: The {part} is not in the Hugging Face cache: it will be downloaded." in done.stderr


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_each_variable_that_keeps_off_the_network_is_seen(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert hub.offline_by() is None
    monkeypatch.setenv(variable, "0")
    assert hub.offline_by() is None
    monkeypatch.setenv(variable, "True")
    assert hub.offline_by() == variable


def test_a_local_model_that_lacks_a_shard_is_an_error(filled: Path, patched: Path, tmp_path: Path) -> None:
    (snapshot,) = (filled / "hub/models--org--tiny/snapshots").iterdir()
    shutil.copytree(snapshot, tmp_path / "model")
    (first, *_) = sorted((tmp_path / "model").glob("*.safetensors"))
    first.unlink()
    done = check(patched, filled, *AT_V0[:2], "--model", tmp_path / "model", *AT_V0[4:6], "--data-revision", "v0")
    assert done.returncode == 76
    assert f"The model {tmp_path / 'model'} lacks {first.name}." in done.stderr


# --- what goes wrong ---


def no_change(fake: FakeHub) -> None:
    pass


def gated(part: str, status: int) -> Callable[[FakeHub], None]:
    return lambda fake: fake.gated.update({part: status})


def cut_off(name: str) -> Callable[[FakeHub], None]:
    return lambda fake: setattr(fake, "cut", lambda file, start: 0 if file == name else None)


def without(key: str, name: str) -> Callable[[FakeHub], None]:
    def change(fake: FakeHub) -> None:
        revisions = fake.repositories[key]
        fake.repositories[key] = {r: {n: c for n, c in files.items() if n != name} for r, files in revisions.items()}

    return change


@pytest.mark.parametrize(
    ("change", "given", "messages"),
    [
        (gated("models/org/tiny", 401), GIVEN, ("The model org/tiny is gated", "`hf auth login`")),
        (gated("models/org/tiny", 403), GIVEN, ("The model org/tiny is gated", "/org/tiny, then `hf auth login`")),
        (gated("datasets/org/MyRows", 401), GIVEN, ("The data org/MyRows is gated", "`hf auth login`")),
        (gated("datasets/org/MyRows", 403), GIVEN, ("The data org/MyRows is gated", "/datasets/org/MyRows, then")),
        (no_change, (*GIVEN, "--model", "org/none"), ("There is no model org/none", "`hf auth login`")),
        (no_change, (*GIVEN, "--data", "org/none"), ("There is no data org/none", "`hf auth login`")),
        (no_change, (*GIVEN, "--model-revision", "v9"), ("no model org/tiny at v9", "--model-revision takes")),
        (no_change, (*GIVEN, "--data-revision", "v9"), ("no data org/MyRows at v9", "--data-revision takes")),
        (cut_off("model.safetensors"), GIVEN, ("Cannot fetch the model org/tiny", "goes on where it was")),
        (cut_off("train.jsonl"), GIVEN, ("Cannot fetch the data org/MyRows", "goes on where it was")),
        (lambda fake: setattr(fake, "closes_connections", True), GIVEN, ("Cannot fetch the model org/tiny",)),
        (lambda fake: fake.sizes.update({"model.safetensors": 10**17}), GIVEN, ("needs 100000000.0 GB more",)),
        (without("models/org/tiny", "config.json"), GIVEN, ("has no config.json",)),
        (without("models/org/tiny", "model.safetensors"), GIVEN, ("has no weights that transformers could load",)),
        (without("models/org/tiny", "model-00001-of-00004.safetensors"), AT_V0, ("is not whole on the hub: it lacks",)),
        (without("models/org/tiny", "tokenizer.json"), GIVEN, ("The tokenizer of org/tiny cannot be used",)),
        (without("datasets/org/MyRows", "test.jsonl"), GIVEN, ()),
        (without("datasets/org/MyRows", "README.md"), AT_V0, ("lacks the README.md", "Give --data-revision ")),
    ],
)
def test_what_cannot_be_fetched_is_one_message(
    prefetch: Prefetch, fake: FakeHub, change: Callable[[FakeHub], None], given: tuple[str, ...], messages: Any
) -> None:
    change(fake)
    done = prefetch(*given)
    if not messages:  # a dataset of one split is divided
        assert done.returncode == 0, done.stderr
        return
    said = one_message(done)
    for message in messages:
        assert message in said
    assert "HF_HUB_OFFLINE=1 ambersafe" not in done.stdout


def test_rows_without_a_column_are_an_error_of_the_data(prefetch: Prefetch, fake: FakeHub) -> None:
    fake.repositories["datasets/org/MyRows"] = {"main": {"train.jsonl": b'{"prompt": "p", "response_0": "r"}\n'}}
    done = prefetch(*GIVEN)
    assert done.returncode == 65, done.stderr
    assert "no column response_1" in done.stderr


def test_no_network_is_one_message(tmp_path: Path) -> None:
    done = run_ambersafe("prefetch", *GIVEN, cwd=tmp_path, env=surroundings(tmp_path, "http://127.0.0.1:9"))
    assert "Cannot fetch the model org/tiny from http://127.0.0.1:9" in one_message(done)


def test_a_variable_that_keeps_off_the_network_is_named(tmp_path: Path) -> None:
    done = run_ambersafe("prefetch", *GIVEN, cwd=tmp_path)
    assert done.returncode == 64
    assert "HF_HUB_OFFLINE is set" in done.stderr


@pytest.mark.parametrize(("limit", "part"), [(10**6, "model"), (3000, "data")])
def test_a_disk_that_fills_up_is_one_message(fake: FakeHub, tmp_path: Path, limit: int, part: str) -> None:
    """The limit of a file's size stands for the end of the disk."""
    if part == "data":
        assert run_ambersafe("prefetch", *GIVEN, cwd=tmp_path, env=surroundings(tmp_path, fake.url)).returncode == 0
        shutil.rmtree(tmp_path / "datasets")
    command = [sys.executable, "-m", "ambersafe_cli", "prefetch", *GIVEN]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **surroundings(tmp_path, fake.url)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert f"The disk is full: no room for the {part} org/" in one_message(done)


def test_a_full_disk_is_told_from_an_error_far_down() -> None:
    source = hub.Source("model", "org/tiny", None)
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("Data processing error") from error
    except RuntimeError as error:
        assert "disk is full" in fetching.failure(source, error).message


# --- which files ---

NAMES = st.text("abc/.", min_size=1, max_size=6).map(lambda name: name.strip("/") or "a")


@given(st.sets(NAMES | st.sampled_from(["config.json", "tokenizer.json", "merges.txt", "model.safetensors", "a.bin"])))
def test_only_files_that_are_there_are_chosen_and_no_weights_but_those_that_were_named(names: set[str]) -> None:
    chosen = fetching.choose_files(names, ["model.safetensors", "gone.safetensors"])
    assert set(chosen) <= names
    assert {name for name in chosen if name.endswith((".safetensors", ".bin"))} <= {"model.safetensors"}
    assert {"config.json", "tokenizer.json", "merges.txt", "model.safetensors"} & names <= set(chosen)
