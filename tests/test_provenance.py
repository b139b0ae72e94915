"""What run.json says of how a run came about: fingerprints, versions, git, settings, and no secret."""

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import runpy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import Ambersafe, git, interpreter, only_run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_real_upstream import TINY, model, rows  # noqa: F401, fixtures

from ambersafe_cli import checkpoints, demo, patches, provenance, saferlhf

LOOK = runpy.run_path(str(Path(demo.__file__).parent / "children" / "look_at_data.py"))
SCHEMA = pa.schema(
    [(name, pa.large_string() if kind == "string" else pa.bool_()) for name, kind in saferlhf.SAFERLHF_COLUMNS.items()]
)
Row = dict[str, Any]
rows_of_any_text = st.lists(
    st.fixed_dictionaries(
        {
            name: st.text(st.characters(codec="utf-8"), max_size=8) if kind == "string" else st.booleans()
            for name, kind in saferlhf.SAFERLHF_COLUMNS.items()
        }
    ),
    max_size=12,
)


def fingerprint(table: pa.Table) -> str:
    found = LOOK["fingerprint"](table)
    assert isinstance(found, str)
    return found


def as_documented(known: list[Row]) -> str:
    """The fingerprint by its definition, row by row."""
    parts = []
    for name, kind in saferlhf.SAFERLHF_COLUMNS.items():
        parts.append(f"{name}\0{len(known)}\0".encode())
        if kind == "bool":
            parts += [bytes([row[name]]) for row in known]
        else:
            parts += [len(row[name].encode()).to_bytes(8, "little") for row in known]
            parts += [row[name].encode() for row in known]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@settings(deadline=None)
@given(rows_of_any_text, st.lists(st.integers(0, 12), max_size=4), st.data())
def test_a_fingerprint_is_that_of_the_rows_however_they_are_cut(known: list[Row], cuts: list[int], data: Any) -> None:
    table = pa.Table.from_pylist(known, SCHEMA)
    assert fingerprint(table) == as_documented(known)
    edges = sorted({0, len(known), *(min(cut, len(known)) for cut in cuts)})
    pieces = [table.slice(a, b - a) for a, b in itertools.pairwise(edges)]
    assert fingerprint(pa.concat_tables([*pieces, table.slice(0, 0)])) == as_documented(known)
    first = data.draw(st.integers(0, len(known)))
    assert fingerprint(table.slice(first)) == as_documented(known[first:])


@settings(deadline=None)
@given(rows_of_any_text, rows_of_any_text)
def test_other_rows_have_another_fingerprint(some: list[Row], others: list[Row]) -> None:
    same = fingerprint(pa.Table.from_pylist(some, SCHEMA)) == fingerprint(pa.Table.from_pylist(others, SCHEMA))
    assert same == (some == others)


def test_equal_rows_of_a_jsonl_and_a_parquet_file_have_equal_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [json.loads(line) for line in (demo.DATA / "train.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"more": 1, **row}) + "\n" for row in known))
    pyarrow.parquet.write_table(pa.Table.from_pylist(known), tmp_path / "rows.parquet", row_group_size=7)
    found = []
    for name in ("rows.jsonl", "rows.parquet"):
        monkeypatch.setenv("SAFERLHF_DATASET", str(tmp_path / name))
        found.append([fingerprint(saferlhf.load_saferlhf(split, silent=True)) for split in ("train", "test")])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_checkpoint_is_known_again_by_what_it_holds_and_not_by_its_name(tmp_path: Path) -> None:
    import torch

    def save(name: str, value: float) -> Path:
        path = tmp_path / name
        torch.save({"step_idx": 1, "state": {"a": torch.full((1000,), value)}, "metrics": {}}, path)
        return path

    one = checkpoints.fingerprint(save("policy.pt", 1.0))
    assert one
    assert len(one) == 64
    assert checkpoints.fingerprint(save("of another name.pt.new", 1.0)) == one
    assert checkpoints.fingerprint(save("other.pt", 1.0000001)) != one
    cut_off = tmp_path / "cut_off.pt"
    cut_off.write_bytes((tmp_path / "policy.pt").read_bytes()[:-100])
    assert checkpoints.fingerprint(cut_off) is None
    assert checkpoints.fingerprint(tmp_path) is None
    assert checkpoints.fingerprint(tmp_path / "no.pt") is None


def read_record(work: Path) -> Any:
    """The record of the newest run of a working folder."""
    return json.loads(max(work.glob(".cache/*/*/run.json"), key=lambda path: path.stat().st_ctime_ns).read_text())


def test_a_record_holds_all_that_a_run_came_from(ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path) -> None:
    import torch

    archive = tmp_path / "policy.pt"
    torch.save({"step_idx": 1, "state": {}, "metrics": {}}, archive)
    variables = {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "WARN", "HOME": str(tmp_path)}
    given = ("--model", tmp_path, "--archive", archive, "--no-preflight", "--allow-modified")
    done = ambersafe("dpo", *given, env=variables)
    assert done.returncode == 0, done.stderr
    record = read_record(fake_clone.parent)

    series = patches.read_series()
    assert [each["name"] for each in record["upstream"]["series"]] == [patch.name for patch in series]
    for each, patch in zip(record["upstream"]["series"], series, strict=True):
        assert each["sha256"] == hashlib.sha256(patch.path.read_bytes()).hexdigest()
        assert (each["commit"], each["state"]) == (patch.commit, "altered")
    python = record["python"]
    assert (python["path"], python["version"]) == (interpreter(), platform.python_version())
    for package in ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "pyarrow"):
        assert python["packages"][package] == importlib.metadata.version(package)
    assert python["cuda"] == torch.version.cuda
    assert len(python["gpus"]) == torch.cuda.device_count()
    assert record["machine"]["machine"] == platform.machine()
    assert record["machine"]["cpus"] == os.cpu_count()
    assert record["variables"].items() >= {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "WARN"}.items()
    assert "HOME" not in record["variables"]
    assert record["archive_fingerprint"] == checkpoints.fingerprint(archive)
    assert record["checkpoint_fingerprint"] is None, "what tests/fake_train.py leaves is no zip archive"
    assert (record["preflight"], record["data"]["counts"], record["data"]["fingerprint"]) == (None, None, None)
    assert record["allow_modified"] is True
    assert record["last_metrics"] == {"loss/eval": 1.25}
    assert record["working_folder_git"] is None


def test_the_repository_of_the_working_folder_is_recorded(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    work = fake_clone.parent
    git(work, "init", "--quiet", "--initial-branch=of-mine")
    made = commit_only(work, "recipe é.yaml", "one\n")
    assert provenance.of_working_folder(work) == {
        "commit": made,
        "branch": "of-mine",
        "changed": 0,
        "changed_files": [],
    }
    (work / "recipe é.yaml").write_text("two\n")
    (work / "not tracked").touch()
    done = ambersafe("sft", "--model", tmp_path, "--no-preflight")
    assert done.returncode == 0, done.stderr
    recorded = read_record(work)["working_folder_git"]
    assert (recorded["commit"], recorded["changed"], recorded["changed_files"]) == (made, 1, ["recipe é.yaml"])

    git(work, "checkout", "--quiet", "--detach")
    git(work, "mv", "recipe é.yaml", "other name")
    found = provenance.of_working_folder(work)
    assert found
    assert (found["branch"], found["changed"]) == (None, 2)
    for number in range(provenance.NAMES_SHOWN):
        (work / f"{number}").touch()
        git(work, "add", f"{number}")
    found = provenance.of_working_folder(work)
    assert found
    assert (found["changed"], len(found["changed_files"])) == (provenance.NAMES_SHOWN + 2, provenance.NAMES_SHOWN)


def commit_only(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    git(folder, "add", "--", name)
    git(folder, "commit", "--quiet", "--message", "One")
    return git(folder, "rev-parse", "HEAD")


def test_no_repository_stops_or_holds_up_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.of_working_folder(tmp_path) is None
    git(tmp_path, "init", "--quiet", "--bare", "bare")
    assert provenance.of_working_folder(tmp_path / "bare") is None
    git(tmp_path, "init", "--quiet", "--initial-branch=main", "empty")
    found = provenance.of_working_folder(tmp_path / "empty")
    assert found == {"commit": None, "branch": "main", "changed": 0, "changed_files": []}

    work = tmp_path / "work"
    work.mkdir()
    git(work, "init", "--quiet", "--initial-branch=main")
    made = commit_only(work, "a", "one")
    for name in ("post-index-change", "fsmonitor-watchman"):
        (work / ".git/hooks" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (work / ".git/hooks" / name).chmod(0o755)
    git(work, "config", "core.fsmonitor", ".git/hooks/fsmonitor-watchman")
    (tmp_path / "ran").unlink(missing_ok=True)
    os.utime(work / "a", (1, 1))
    index = (work / ".git/index").read_bytes()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "bare"))
    found = provenance.of_working_folder(work)
    assert found
    assert found["commit"] == made, "not the repository that a hook which runs us would name"
    assert not (tmp_path / "ran").exists()
    assert (work / ".git/index").read_bytes() == index

    (work / ".git/HEAD").write_text("broken")
    assert provenance.of_working_folder(work) is None
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tools / "git").chmod(0o755)
    monkeypatch.setattr(provenance, "GIT_TIMEOUT", 0.2)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    assert provenance.of_working_folder(work) is None, "git that does not answer"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.of_working_folder(work) is None, "no git"


SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "HUGGING_FACE_HUB_TOKEN": "hf_ZyXwVuTsRqPoNmLkJiHgFeDcBa543210",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "sessiontoken-0000-1111",
    "GITHUB_TOKEN": "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "OPENAI_API_KEY": "sk-proj-0123456789abcdefghijklmnop",
    "HTTPS_PROXY": "http://someone:proxypassword@proxy.example.org:3128",
    "HF_ENDPOINT": "https://someone:endpointpassword@hub.example.org",
    "PIP_INDEX_URL": "https://someone:indexpassword@pypi.example.org/simple",
    "SSH_AUTH_SOCK": "/tmp/ssh-socket-of-mine",
    "MY_OWN_PASSWORD": "correct horse battery staple",
}


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_no_secret_of_the_environment_or_the_clones_url_is_in_the_run_folder(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path
) -> None:
    git(fake_clone, "remote", "add", "origin", "https://someone:clonepassword@git.example.org/dpo.git")
    git(fake_clone.parent, "init", "--quiet")
    git(fake_clone.parent, "remote", "add", "origin", "https://someone:workpassword@git.example.org/work.git")
    commit_only(fake_clone.parent, "a", "one")
    for fake, status in (("crash", 3), ("train", 0)):
        done = ambersafe("sft", "--model", tmp_path, "--no-preflight", env={**SECRETS, "FAKE": fake})
        assert done.returncode == status, done.stderr
    answers = [ambersafe("show", *given, env=SECRETS) for given in ((), ("--json",))]
    assert not any(answer.returncode for answer in answers)
    kept = everything_in(fake_clone.parent / ".cache") + "".join(answer.stdout for answer in answers).encode()
    assert b"git.example.org/dpo.git" in kept, "or this test looks at the wrong place"
    for secret in (*SECRETS.values(), "clonepassword", "workpassword", "proxypassword", "endpointpassword"):
        assert secret.encode() not in kept, secret


@pytest.mark.parametrize(
    "given",
    [
        ("+wandb.api_key=0123456789abcdef0123456789abcdef01234567",),
        ("+hf_token=abc",),
        ("+token='abc'",),
        ("+note=hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",),
        ("+proxy='http://me:word@proxy.example.org'",),
        ("+deep={a: ghp_0123456789abcdefghijABCDEFGHIJ012345}",),
        ("--exp-name", "sk-0123456789abcdefghijklmnop"),
        ("+note=glpat-0123456789abcdefghij",),
        ("+note=xoxb-0123456789-abcdef",),
        ("+wandb.key=0123456789abcdef",),
        ("+note='https://0123456789abcdef0123@example.org/a'",),
        ("+note='https://example.org/a?private_token=0123456789'",),
        ("--slurm", "--gpus-per-node", "1", "--sbatch=--export=ALL,HF_TOKEN=abc"),
        ("--slurm", "--gpus-per-node", "1", "--sbatch=--export ALL,HF_TOKEN=abc"),
        ("--slurm", "--gpus-per-node", "1", "--sbatch=--comment=glpat-0123456789abcdefghij"),
        ("--recipe", "secret.yaml"),
    ],
)
def test_a_secret_on_the_command_line_or_in_a_recipe_is_refused_and_not_repeated(
    ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path, given: tuple[str, ...]
) -> None:
    (fake_clone.parent / "secret.yaml").write_text("dpo:\n  wandb.password: abc\nsft:\n  exp_name: a\n")
    done = ambersafe("sft", "--model", tmp_path, "--no-preflight", *given)
    assert done.returncode == 64
    assert "looks like a secret" in done.stderr
    assert not given[-1].startswith(("+", "sk-")) or given[-1].rpartition("=")[2] not in done.stderr
    assert not (fake_clone.parent / ".cache").exists()


def test_what_only_sounds_like_a_secret_is_taken(ambersafe: Ambersafe, fake_clone: Path, tmp_path: Path) -> None:
    given = ("+model.pad_token='<pad>'", "+max_tokens=5", "+use_auth_token=true", "+token=null", "+keys=[a,b]")
    done = ambersafe("sft", "--model", tmp_path, "--no-preflight", *given)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_real_run_can_be_traced_to_its_rows_its_weights_and_its_code(
    ambersafe: Ambersafe,
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    given = ("--dir", patched, "--model", model, "--data", rows, "--trainer", "BasicTrainer", *TINY, "n_epochs=null")
    done = ambersafe("sft", *given, "n_examples=32", "--exp-name", "one", env=SECRETS)
    assert done.returncode == 0, done.stderr
    sft = read_record(work)
    counted = json.loads(ambersafe("data", "--data", rows, "--json").stdout)
    for split in ("train", "test"):
        of_split = counted[split]
        counts = {key: of_split[key] for key in ("rows", "prompts", "pairs")}
        assert sft["data"]["counts"][split] == counts
        read = [json.loads(line) for line in (rows / f"{split}.jsonl").read_text().splitlines()]
        assert sft["data"]["fingerprint"][split] == as_documented(read)
    found = [f"{finding['level']}: {finding['what']}" for finding in sft["preflight"]]
    assert found
    assert all(finding in done.stderr for finding in found)
    assert sft["allow_modified"] is False
    assert {each["state"] for each in sft["upstream"]["series"]} == {"applied"}
    assert [each["commit"] for each in sft["upstream"]["series"]][-1] == sft["upstream"]["head"]
    assert sft["upstream"]["tree"] == git(patched, "rev-parse", "HEAD^{tree}")

    assert ambersafe("dpo", *given, "n_examples=32", "--exp-name", "two").returncode == 0
    dpo = read_record(work)
    assert dpo["sft_run"] == str(only_run(work, "one"))
    assert dpo["archive_fingerprint"] == sft["checkpoint_fingerprint"]
    assert dpo["checkpoint_fingerprint"] not in (None, dpo["archive_fingerprint"])
    assert dpo["data"]["fingerprint"] == sft["data"]["fingerprint"]
    kept = everything_in(only_run(work, "one"))
    assert not [name for name, secret in SECRETS.items() if secret.encode() in kept]

    (only_run(work, "two") / "LATEST").rename(tmp_path / "LATEST")
    (only_run(work, "two") / "run.json").write_text(json.dumps({**dpo, "status": "interrupted"}))
    assert ambersafe("resume", "two", env={"OMP_NUM_THREADS": "1"}).returncode == 0
    first, second = read_record(work)["attempts"]
    assert "python" not in first, "that is the run's own"
    assert (second["python"], second["upstream"]["head"]) == (dpo["python"], dpo["upstream"]["head"])
    assert second["variables"]["OMP_NUM_THREADS"] == "1"
