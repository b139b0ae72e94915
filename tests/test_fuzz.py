"""What reads files of others, given arbitrary and damaged ones: it says what is wrong, and never anything else.

A quick part of the examples runs with the other tests, all of them with `scripts/test --faults`; see faults.py.
"""

import contextlib
import io
import json
import math
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import made_runs
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ambersafe_cli import (
    as_trained,
    checkpoints,
    clone_config,
    curves,
    following,
    hub,
    integrity,
    journal,
    memory,
    metrics,
    models,
    origins,
    pages,
    recipe,
    recorded,
    records,
    resuming,
    runs,
    show,
    value_findings,
    watch,
)
from ambersafe_cli.errors import AmberSafeError, ArchiveError, CloneError, RecipeError, RunFolderError

pytestmark = pytest.mark.slow

Fuzz = Callable[[Callable[..., None]], Callable[..., None]]
fuzz = settings(
    max_examples=2_500 if faults.ALL else 150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# --- what stands in the files ---

NUMBERS = ["0", "-1", "1.5", f"{2**63}", "1e400", "-1e400", "NaN", "Infinity", "1" * 400, "1" * 5000, "0x" + "f" * 5000]
ODD_TEXTS = ["", "\0", "../../x", "~nobody-of-that-name", "x" * 300, "\ud800", "\x1b[2J", "${x}", "[" * 50, "sft"]
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 1, 2**63, -(2**63), 10**400, 1e308, math.inf, math.nan, [], {}, [[]], [None], [{}], {"a": {}},
    {"": None}, *ODD_TEXTS,
]  # fmt: skip
values = st.recursive(
    st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=8),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value in a nested one."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """A nested value with another one at a place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = other
    return copy


def changed(good: Any) -> st.SearchStrategy[Any]:
    """A nested value with others at one to three of its places, or with a key more."""
    where = st.sampled_from(list(places(good)))

    def change(edits: list[tuple[tuple[Any, ...], Any]]) -> Any:
        found = good
        for path, other in edits:
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier one has replaced what it lies in
                found = put(found, path, other)
        return found

    more = st.tuples(st.text(max_size=5).map(lambda key: (key,)), values)
    return st.lists(st.tuples(where, values) | more, min_size=1, max_size=3).map(change)


def damaged(good: bytes, depth: int = 100_000) -> st.SearchStrategy[bytes]:
    """Bytes that are cut off, flipped, replaced, or have a number or a text of another kind among them."""
    at = st.integers(0, len(good))
    pieces = st.binary(max_size=12) | st.sampled_from([
        *(each.encode() for each in NUMBERS), b"\xff\xfe", b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 2**62),
        b'"\\ud800"',
        b"[" * depth, b'{"a":' * depth, b"- " * 500, b"[[" * 300 + b"]]" * 300, b"}", b"{", b"'", b"\n",
    ])  # fmt: skip

    def edit(edits: list[tuple[int, int, bytes]]) -> bytes:
        found = good
        for start, length, piece in edits:
            found = found[:start] + piece + found[start + length :]
        return found

    cut = at.map(lambda end: good[:end])
    edits = st.lists(st.tuples(at, st.integers(0, 12), pieces), min_size=1, max_size=4).map(edit)
    return cut | edits | st.binary(max_size=300)


@contextlib.contextmanager
def quiet() -> Iterator[Path]:
    """A working folder of its own, whose commands print into nothing."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        yield Path(folder)


# --- run.json ---

RECORD = {
    "schema": 1,
    "stage": "dpo",
    "status": "failed",
    "started": "2026-11-24T00:00:00+00:00",
    "ended": "2026-11-24T01:00:00+00:00",
    "exit_status": 1,
    "attempts": [
        {"started": "2026-11-24T00:00:00+00:00", "ended": "2026-11-24T01:00:00+00:00", "exit_status": 1, "host": "a"}
    ],
    "command": ["python", "/clone/train.py", "lr=1e-6"],
    "next_command": ["ambersafe", "export", "run"],
    "environment": {"SAFERLHF_DATASET": "some/data"},
    "model": {"name": "some/model", "revision": None, "commit": "a" * 40},
    "data": {
        "name": "some/data",
        "revision": "v0",
        "commit": "b" * 40,
        "counts": {"train": {"rows": 5, "prompts": 4, "pairs": 3}},
        "fingerprint": {"train": "c" * 64},
    },
    "archive": "/nowhere/LATEST/policy.pt",
    "archive_fingerprint": "d" * 64,
    "checkpoint_fingerprint": "d" * 64,
    "sft_run": "/nowhere",
    "recipe": {"source": "tiny", "description": "", "data": None, "values": {"sft": {"lr": 1}, "dpo": {"lr": 1}}},
    "values": {"lr": 1, "keep_best": "loss/eval", "keep_checkpoints": 2, "template": "hh"},
    "overrides": ["max_length=64", "max_prompt_length=32"],
    "processes": 1,
    "machines": {"count": 1, "number": 0, "endpoint": None, "restarts": 0, "patience": 600},
    "slurm": {"job_id": None, "nodes": 1, "processes": 1},
    "python": {"version": "3.11", "packages": {"torch": "2"}, "gpus": ["a"], "cuda": None},
    "machine": {"system": "Linux", "machine": "x86_64", "cpus": 2},
    "variables": {"LANG": "C"},
    "working_folder_git": {"commit": "e" * 40, "branch": "main", "changed": 1, "changed_files": ["a"]},
    "planned_examples": 100,
    "preflight": [{"level": "warning", "what": "this"}],
    "last_metrics": {"loss/eval": 0.5, "rewards_eval/accuracies": None},
    "tensorboard": False,
    "ambersafe_version": "0",
    "upstream": {
        "folder": "/clone",
        "url": "https://example.org",
        "base": "f" * 40,
        "head": "c" * 40,
        "edited": [],
        "edits": None,
        "on_top": [],
        "can_resume": True,
        "patches": {"0001.patch": "applied"},
        "series": [{"name": "0001.patch", "state": "applied", "sha256": "0" * 64}],
    },
}


def read_by_all(folder: Path) -> None:
    """Have everything that reads a run's folder without a child look at one."""
    readers: list[Callable[[], Any]] = [
        lambda: show.table(as_json=False),
        lambda: show.table(as_json=True),
        lambda: show.run("run", as_json=False),
        lambda: show.run("run", as_json=True),
        lambda: watch.run("run", plain=True),
        lambda: watch.run("run", plain=False),
        lambda: models.find("run"),
        lambda: models.lineage(runs.open_run("run")),
        lambda: models.reference_of(runs.open_run("run")),
        lambda: as_trained.config(runs.open_run("run")),
        lambda: as_trained.rows(runs.open_run("run"), as_trained.config(runs.open_run("run"))),
        lambda: recorded.pinned(runs.read(runs.find("run")) or RECORD, folder),
        lambda: recorded.words(runs.read(runs.find("run")) or RECORD, folder),
        lambda: resuming.resume("run", None, False, False, plain=False),
        lambda: resuming.resume(None, None, False, False, plain=False),
        lambda: list(origins.data(origins.stages_of(runs.open_run("run")))),
        lambda: list(origins.training(origins.stages_of(runs.open_run("run")))),
        lambda: list(origins.provenance(origins.stages_of(runs.open_run("run")))),
        lambda: pages.with_earlier(runs.open_run("run")),
        lambda: (pages.samples(runs.open_run("run")), pages.evaluation([runs.open_run("run")])),
        lambda: runs.newest_finished_sft("some/model", None),
        lambda: runs.best_checkpoint(folder, "loss/eval"),
    ]
    for reader in readers:
        with contextlib.suppress(AmberSafeError):
            reader()


@pytest.mark.parametrize("read", [False, True])
def test_the_record_that_is_damaged_here_is_one(read: bool) -> None:
    assert records.problem(RECORD) is None
    with quiet():
        folder = made_runs.recorded(runs.folder_of_runs() / "run", "dpo")
        (folder / "run.json").write_text(json.dumps(RECORD))
        assert runs.read(folder) == RECORD
        if read:
            read_by_all(folder)


@fuzz
@given(changed(RECORD).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(RECORD, indent=1).encode()))
@example(json.dumps({**RECORD, "machines": {"more": 1}}).encode())
@example(json.dumps({**RECORD, "slurm": [1]}).encode())
@example(json.dumps({**RECORD, "stage": "kto"}).encode())
@example(json.dumps({**RECORD, "planned_examples": 10**400}).encode())
def test_a_record_is_read_or_it_is_said_what_is_wrong(content: bytes) -> None:
    with quiet():
        folder = made_runs.recorded(runs.folder_of_runs() / "run", "dpo")
        (folder / "run.json").write_bytes(content)
        for name in ("LATEST", "step-16"):
            (folder / name).mkdir()
            (folder / name / "policy.pt").touch()
        try:
            assert isinstance(runs.read(folder), dict)
        except RunFolderError as error:
            assert str(folder / "run.json") in error.message
            assert error.hint
        read_by_all(folder)
        assert (folder / "run.json").read_bytes() == content


FIGURE = {"value": 0.5, "low": 0.4, "high": 0.6, "pairs": 3, "prompts": 2}
EVALUATION = {
    "model": {"label": "dpo"},
    "reference": {"label": "sft"},
    "data": {"name": "some/data", "split": "test", "pairs": 3, "prompts": 2},
    "figures": {"safe_more_likely": FIGURE},
    "by_category": {"a": {"safe_more_likely": FIGURE}},
    "upstream": {"agrees": True, "examples": 3},
}
SAMPLES = {
    "settings": {"prompts": "held-out ones", "temperature": 0, "seed": 0, "max_new_tokens": 8},
    "time": "2026-11-24T00:00:00+00:00",
    "samples": [{"prompt": "p", "answers": [{"label": "sft", "text": "a", "stopped": False, "tokens": 8}]}],
}


@fuzz
@given(st.fixed_dictionaries({"evaluation.json": changed(EVALUATION), "samples.json": changed(SAMPLES)}), values)
def test_what_other_commands_kept_is_read_or_left_away(kept: dict[str, Any], metric: Any) -> None:
    with quiet():
        folder = made_runs.recorded(runs.folder_of_runs() / "run", "sft")
        for name, value in kept.items():
            (folder / name).write_text(json.dumps(value))
        (folder / "LATEST").mkdir()
        (folder / "LATEST" / "metrics.json").write_text(json.dumps({"loss/eval": metric}))
        found = [runs.open_run("run")]
        pages.samples(found[0])
        pages.evaluation(found)
        show.run("run", as_json=False)


# --- YAML: recipes, upstream's config ---

RECIPE = yaml.safe_load((recipe.FOLDER / "tiny.yaml").read_text())
CONFIG = {
    "loss": {"name": "dpo", "beta": 0.1},
    "model": {"name_or_path": "some/model", "archive": None, "policy_dtype": "float32", "fsdp_policy_mp": None},
    "lr": 5e-7,
    "max_length": 64,
    "max_prompt_length": 32,
    "datasets": ["saferlhf"],
    "trainer": "BasicTrainer",
    "template": None,
    "n_eval_examples": 16,
    "eval_batch_size": 16,
    "mixed_precision": None,
    "keep_eos": False,
}
YAMLS = [
    b"&a [*a]", b"a: &a [x]\nb: &b [*a,*a]\nc: [*b,*b]", b"!!int ''", b"!!bool x", b"!!set {a}", b"? [a]\n: b",
    b"<<: 3",
]  # fmt: skip


def as_yaml(good: Any) -> st.SearchStrategy[bytes]:
    text = yaml.safe_dump(good).encode()
    whole = changed(good).map(lambda value: yaml.safe_dump(value).encode(errors="surrogatepass"))
    return (
        whole
        | damaged(text, depth=2_000)
        | st.sampled_from(YAMLS)
        | st.sampled_from(YAMLS).map(lambda each: text + each)
    )


@fuzz
@given(as_yaml(RECIPE))
def test_a_recipe_is_read_or_it_is_said_what_is_wrong(content: bytes) -> None:
    with quiet() as folder:
        path = folder / "mine.yaml"
        path.write_bytes(content)
        try:
            chosen = recipe.load(str(path))
        except RecipeError as error:
            assert str(path) in error.message
            return
        for stage in ("sft", "dpo"):
            with contextlib.suppress(AmberSafeError):
                found = recipe.resolve(stage, chosen, recipe.Flags({"model.name_or_path": "m"}), ())
                json.dumps(found.values)


@fuzz
@given(as_yaml(CONFIG))
@example(b"exp_name: 2026-01-01\nloss: {name: sft}\nmodel: {name_or_path: m}")
@example(b"model: {name_or_path: m}\nloss: {name: sft}\nmax_length: {a: 1}")
@example(b"loss: {name: dpo}\nmodel: {name_or_path: m, archive: /" + 300 * b"1" + b"}")
def test_a_config_that_upstream_wrote_is_read_or_it_is_said_what_is_wrong(content: bytes) -> None:
    with quiet():
        folder = made_runs.by_hand(runs.folder_of_runs() / "run", "sft", made_runs.records("sft", 2))
        (folder / "config.yaml").write_bytes(content)
        read_by_all(folder)


OF_CLONE = {**dict.fromkeys(clone_config.NEEDED, 1), "wandb": {"enabled": False}, "defaults": [{"model": "m"}]}


def a_stage() -> recipe.Stage:
    flags: dict[str, Any] = {"model.name_or_path": "m", "datasets": ["hh"], "exp_name": "e"}
    return recipe.resolve("sft", recipe.load("tiny"), recipe.Flags(flags), ())


@pytest.mark.parametrize("key", [key for key in OF_CLONE if "." not in key and key not in ("defaults", "datasets")])
def test_a_clones_config_that_lacks_a_key_is_said_to(key: str, tmp_path: Path) -> None:
    stage = a_stage()
    for group in ("model", "loss"):
        (tmp_path / "config" / group).mkdir(parents=True)
        (tmp_path / "config" / group / f"{stage.get(group)}.yaml").write_text("policy_dtype: a\nreference_dtype: a\n")
    lacking = {other: value for other, value in OF_CLONE.items() if other != key}
    (tmp_path / "config" / "config.yaml").write_text(json.dumps(lacking))
    with pytest.raises(CloneError, match=rf"lacks .*{key}"):
        list(value_findings.of_values("sft", clone_config.effective(tmp_path, stage)))


@fuzz
@given(st.data())
def test_the_clones_config_is_read_or_it_is_said_what_is_wrong(data: st.DataObject) -> None:
    stage = a_stage()
    with quiet() as folder:
        for name in ("model", "loss"):
            (folder / "config" / name).mkdir(parents=True)
            for each in ("m", "l", stage.get(name)):
                (folder / "config" / name / f"{each}.yaml").write_text("policy_dtype: float32\nreference_dtype: a\n")
        path = folder / "config" / "config.yaml"
        path.write_bytes(data.draw(as_yaml(OF_CLONE)))
        with contextlib.suppress(AmberSafeError):
            list(value_findings.of_values("sft", clone_config.effective(folder, stage)))


# --- metrics ---

STEP = (
    "train stats after 32 examples: {'rewards_train/accuracies': '0.5', 'loss/train': '0.69315', 'grad_norm': 'nan', "
    "'counters/examples': 32, 'counters/updates': 1}"
)
LOG = "\n".join([
    "training on 96 examples in all", f"resolved model a b to revision {'1' * 40}", "eval after 0: {'loss/eval': '2'}",
    STEP, "=== ambersafe: attempt 2", STEP.replace("32", "48"), "Computing: 50%|   |\rComputing: 100%",
]) + "\n"  # fmt: skip
ENTRIES = journal.to_line(metrics.Total(96, 1, 1.7e9)) + "".join(map(journal.to_line, made_runs.records("dpo", 3)))


def read_metrics(folder: Path) -> None:
    """Everything that is made of a run's metrics."""
    for entry in journal.read(folder):
        assert isinstance(entry, journal.Entry)
        if isinstance(entry, metrics.Record):
            assert 0 <= entry.examples < 10**18
            assert all(isinstance(value, float) for value in entry.values.values())
            assert isinstance("".join(entry.values).encode(), bytes), "no half characters"
    metrics.read_log(folder / "train.log")
    run = runs.open_run("run")
    seen = following.of(folder, run.record, run.status)
    for entry in journal.read(folder):
        seen.take_entry(entry)
    seen.look(at_once=True)
    seen.seconds_left()
    curves.read(folder)
    show.run("run", as_json=False)
    show.table(as_json=True)
    watch.run("run", plain=False)


@fuzz
@given(damaged(LOG.encode()) | st.text().map(lambda text: f"eval after 3: {{{text}}}\n".encode(errors="surrogatepass")))
@example(b"eval after 3: {'a': " + b"-" * 100_000 + b"1}\n")
@example(b"eval after 3: {'a': " + b"1+" * 9_000 + b"1}\n")
@example(b"eval after 3: {'a': " + b"(" * 9_000 + b"1}\n")
@example(b"eval after 1: {" * 9_000)
@example(b"resolved model " * 100_000)
@example(b"eval after 1: {" * 100_000)
@example(b"eval after 3: {'a': 1" + b"0" * 400 + b"}\n")
@example(b"eval after 3: {'\\ud800': 1}\n")
def test_a_log_is_read_whatever_it_holds(content: bytes) -> None:
    with quiet():
        folder = made_runs.recorded(runs.folder_of_runs() / "run", "dpo", ended=None)
        (folder / "train.log").write_bytes(content)
        read_metrics(folder)


def as_entries(line: dict[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode() + ENTRIES.encode()


LINE = {"kind": "train", "time": 1.7e9, "attempt": 1, "examples": 16, "loss/train": 0.5, "grad_norm": 5}


@fuzz
@given(damaged(ENTRIES.encode()) | changed(LINE).map(as_entries))
@example(as_entries({**LINE, "time": math.inf}))
@example(as_entries({**LINE, "time": 1e300}))
@example(as_entries({**LINE, "examples": 10**400}))
@example(as_entries({**LINE, "examples": -5}))
@example(as_entries({**LINE, "attempt": 10**30}))
@example(as_entries({**LINE, "\ud800": 1}))
def test_metrics_jsonl_is_read_whatever_it_holds(content: bytes) -> None:
    with quiet():
        folder = made_runs.recorded(runs.folder_of_runs() / "run", "dpo", ended=None)
        (folder / "metrics.jsonl").write_bytes(content)
        read_metrics(folder)


# --- checkpoints and files of weights ---


def policy() -> bytes:
    import torch

    whole = io.BytesIO()
    state = {"model.embed_tokens.weight": torch.zeros(5, 4), "model.layers.0.mlp.up.weight": torch.ones(2, 4)}
    torch.save({"step_idx": 1, "state": state, "metrics": {"loss/eval": 1.0}}, whole)
    return whole.getvalue()


POLICY = policy()


def with_pickle(content: bytes) -> bytes:
    """The same archive with another pickle in it, of the right CRC: what lies behind that check is reached."""
    whole = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(POLICY)) as old, zipfile.ZipFile(whole, "w") as new:
        for each in old.infolist():
            new.writestr(each, content if each.filename.endswith("/data.pkl") else old.read(each))
    return whole.getvalue()


with zipfile.ZipFile(io.BytesIO(POLICY)) as _archive:
    PICKLE = next(_archive.read(each) for each in _archive.namelist() if each.endswith("/data.pkl"))


def read_checkpoint(path: Path) -> None:
    readers: list[Callable[[], Any]] = [
        lambda: memory.shape_of(checkpoints.policy_shapes(path)),
        lambda: checkpoints.differences(checkpoints.policy_shapes(path), {"lm_head.weight": (5, 4)}),
        lambda: checkpoints.parameters(checkpoints.policy_shapes(path)),
        lambda: checkpoints.adapter_of(path),
        lambda: integrity.require_whole(path),
    ]
    for reader in readers:
        try:
            reader()
        except ArchiveError as error:
            assert str(path) in error.message
    assert isinstance(integrity.damage(path), str | None)
    assert isinstance(checkpoints.fingerprint(path), str | None)


@fuzz
@given(damaged(POLICY) | damaged(PICKLE).map(with_pickle))
@example(with_pickle(b"\x80\x02}r\xff\xff\xff\x7f."))  # a memo of 32 GB
@example(with_pickle(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x."))  # bytes of 4 EB
@example(with_pickle(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."))
@example(with_pickle(PICKLE.replace(b"K\x05K\x04\x86", b"K\x05X\x01\x00\x00\x00a\x86")))
def test_a_checkpoint_is_read_or_it_is_said_what_is_wrong(content: bytes) -> None:
    with quiet() as folder:
        for name in ("policy.pt", "pytorch_model.bin"):
            (folder / name).write_bytes(content)
        read_checkpoint(folder / "policy.pt")
        with contextlib.suppress(ArchiveError):
            memory.shape_of(checkpoints.model_shapes(folder) or {})


def test_a_checkpoint_that_says_it_is_large_takes_no_memory_for_that(tmp_path: Path) -> None:
    """A pickle of five bytes, which puts one thing into the memo of number 2**24."""
    (tmp_path / "policy.pt").write_bytes(with_pickle(b"\x80\x02}r\0\0\0\1."))
    tracemalloc.start()
    with pytest.raises(ArchiveError):
        checkpoints.policy_shapes(tmp_path / "policy.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_a_checkpoint_whose_members_share_their_bytes_is_damaged(tmp_path: Path) -> None:
    """Of 1,000 members each holds all that follow: to read them takes a time that grows with the square of the size."""
    body = b""
    found: list[tuple[bytes, bytes, int]] = []
    for number in range(1_000):
        name = f"a/{number:05}".encode()
        fields = struct.pack("<5H3L2H", 20, 0, 0, 0, 0x21, zlib.crc32(body), len(body), len(body), len(name), 0)
        body = b"PK\3\4" + fields + name + body
        found.append((name, fields, len(body)))
    entries = b"".join(
        b"PK\1\2\x14\0" + fields + struct.pack("<3H2L", 0, 0, 0, 0, len(body) - size) + name
        for name, fields, size in found
    )
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1_000, 1_000, len(entries), len(body), 0)
    (tmp_path / "policy.pt").write_bytes(body + entries + end)
    with zipfile.ZipFile(tmp_path / "policy.pt") as archive:
        assert archive.testzip() is None, "nothing else is wrong with it"
    assert "contradicts itself" in str(integrity.damage(tmp_path / "policy.pt"))


HEADER = {
    "__metadata__": {"format": "pt"},
    "model.embed_tokens.weight": {"dtype": "F32", "shape": [5, 4], "data_offsets": [0, 80]},
    "model.layers.0.mlp.up.weight": {"dtype": "F32", "shape": [1, 4], "data_offsets": [80, 96]},
}


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(96)


@fuzz
@given(
    changed(HEADER).map(lambda value: safetensors(json.dumps(value).encode()))
    | damaged(json.dumps(HEADER).encode()).map(safetensors)
    | damaged(safetensors(json.dumps(HEADER).encode()))
)
@example(safetensors(b"{}", 2**63))
@example(safetensors(b"{}", 2**40))
@example(safetensors(b"[]"))
@example(safetensors(json.dumps({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 96]}}).encode()))
@example(safetensors(json.dumps({"embed_tokens.weight": {"dtype": 1, "shape": [4], "data_offsets": [0, 96]}}).encode()))
def test_a_file_of_safetensors_is_read_or_it_is_said_what_is_wrong(content: bytes) -> None:
    with quiet() as folder:
        for name in ("model.safetensors", "adapter_model.safetensors"):
            (folder / name).write_bytes(content)
        try:
            entries = checkpoints.safetensors_entries(folder / "model.safetensors")
            assert all(isinstance(side, int) for shape, _ in entries.values() for side in shape)
        except ValueError as error:
            assert str(error)
        adapter = checkpoints.Adapter(folder, {}, None, None, None)
        for is_adapter in (False, True):
            try:
                found = checkpoints.adapter_shapes(adapter) if is_adapter else checkpoints.model_shapes(folder)
                memory.shape_of(found or {})
            except ArchiveError as error:
                assert str(folder) in error.message


INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@fuzz
@given(changed(INDEX).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(INDEX).encode()))
@example(b'{"weight_map": {"a": "' + b"x" * 300 + b'"}}')
def test_an_index_of_weights_is_read_or_it_is_said_what_is_wrong(content: bytes) -> None:
    with quiet() as folder:
        path = folder / "model.safetensors.index.json"
        path.write_bytes(content)
        assert isinstance(hub.lacking_weights(folder), list)
        try:
            checkpoints.model_shapes(folder)
        except ArchiveError as error:
            assert str(folder) in error.message
