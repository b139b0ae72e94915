"""Uploading a folder to a stand-in for the hub: in a process of its own, as huggingface_hub reads its settings once."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, serve

from ambersafe_cli import pushing
from ambersafe_cli.errors import ExportError, UsageError

TOKEN = "hf_" + "a1B2" * 8
CODE = """
import sys
from pathlib import Path
from ambersafe_cli import display, errors, pushing
try:
    print(pushing.push(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "private"))
except errors.ExportError as error:
    display.fail(error)
    sys.exit(error.exit_status)
"""
FILES = {"README.md": b"---\nlicense: unknown\n---\n# A model\n", "config.json": b"{}", "model.safetensors": b"weights"}

Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with serve(FakeHub(tokens={TOKEN: True, "reader": False})) as running:
        yield running


@pytest.fixture
def push(fake: FakeHub, tmp_path: Path) -> Push:
    folder = tmp_path / "hugging_face"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)

    def push(repo: str, private: bool = False, **settings: str) -> subprocess.CompletedProcess[str]:
        env = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": fake.url, "HF_HUB_OFFLINE": "", "HF_TOKEN": TOKEN}
        arguments = [sys.executable, "-c", CODE, str(folder), repo, "private" if private else "public"]
        done = subprocess.run(arguments, env={**os.environ, **env, **settings}, capture_output=True, text=True)
        assert TOKEN not in done.stdout + done.stderr
        return done

    return push


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_is_made_and_gets_every_file(push: Push, fake: FakeHub, private: bool) -> None:
    done = push("org/x", private)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{fake.url}/org/x\n"
    assert fake.repositories["models/org/x"]["main"] == FILES
    assert ("models/org/x" in fake.private) == private


def test_weights_of_an_earlier_export_go_and_other_files_stay(push: Push, fake: FakeHub) -> None:
    earlier = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"old", "LICENSE": b"mine"}
    fake.repositories["models/org/x"] = {"main": {**earlier, "config.json": b"old"}}
    done = push("org/x")
    assert done.returncode == 0, done.stderr
    assert fake.repositories["models/org/x"]["main"] == {**FILES, "LICENSE": b"mine"}


def test_an_adapter_of_an_earlier_export_goes_where_a_model_is_pushed(push: Push, fake: FakeHub) -> None:
    earlier = {"adapter_model.safetensors": b"old", "adapter_config.json": b"old"}
    fake.repositories["models/org/x"] = {"main": earlier}
    done = push("org/x")
    assert done.returncode == 0, done.stderr
    assert fake.repositories["models/org/x"]["main"] == FILES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"HF_TOKEN": ""}, "nobody is logged in"),
        ({"HF_TOKEN": "reader"}, "may not write there"),
        ({"HF_TOKEN": "hf_unknown"}, "does not know the token"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Cannot push to org/x at http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_pushed_is_one_message_that_says_how_to_do_it_later(
    push: Push, fake: FakeHub, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    done = push("org/x", private=True, **settings)
    assert done.returncode == 79
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    folder = tmp_path / "hugging_face"
    assert f"The folder is there: {folder}" in done.stderr
    assert f"`hf auth login`, then `hf upload org/x {folder} . --private`" in done.stderr
    assert not done.stdout
    assert not fake.repositories


def test_what_is_to_be_private_is_not_pushed_where_all_can_see_it(push: Push, fake: FakeHub) -> None:
    fake.repositories["models/org/x"] = {"main": {}}
    done = push("org/x", private=True)
    assert done.returncode == 79
    assert "everybody can see it" in done.stderr
    assert "hf upload" not in done.stderr, "which would show it to everybody"
    assert not fake.repositories["models/org/x"]["main"]
    assert push("org/x").returncode == 0


def test_whatever_an_error_says_the_token_is_not_in_the_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError(f"header Authorization: Bearer {TOKEN} " + "x" * 300 + TOKEN)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(ExportError, match=r"Bearer \*\*\*") as raised:
        pushing.push(tmp_path, "org/x", False)
    assert "hf_" not in raised.value.message


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "--x", "x/-y", "https://huggingface.co/a/b"])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_made(name: str) -> None:
    with pytest.raises(UsageError, match="--push takes"):
        pushing.require_name(name)
