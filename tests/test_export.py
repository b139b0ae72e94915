"""`ambersafe export`: the folder loads in a process that has only transformers, with the numbers of the checkpoint."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import Ambersafe, run_ambersafe, run_code
from fake_hub import FakeHub, commit_of, serve
from test_real_upstream import model  # noqa: F401, a fixture

from ambersafe_cli import as_trained, checkpoints, export, models, runs
from ambersafe_cli.errors import ExportError, TrainingEnvironmentError, UsageError

CHILDREN = Path(export.__file__).parent / "children"

ALONE = """
import sys
import torch, transformers

folder, model, checkpoint, dtype = sys.argv[1:]
exported, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(found.values()), found
assert exported.dtype == getattr(torch, dtype), exported.dtype
trained = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
trained.load_state_dict(torch.load(checkpoint, weights_only=True)["state"])
one, other = (transformers.AutoTokenizer.from_pretrained(each) for each in (folder, model))
for text in ("Hello  world", "\\n\\nHuman: I\\'ve a question.\\n\\nAssistant:", "é 你好 🙂 \\t </s> <s>x", " "):
    for special in (False, True):
        ids = one(text, add_special_tokens=special)["input_ids"]
        assert ids == other(text, add_special_tokens=special)["input_ids"], text
        assert one.decode(ids) == other.decode(ids)
    batch = torch.tensor([ids])
    with torch.no_grad():
        assert torch.equal(exported(batch).logits, trained(batch).logits), text
assert str(one.special_tokens_map) == str(other.special_tokens_map)
assert one.chat_template == other.chat_template and one.chat_template
untrained = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
assert not torch.equal(untrained(batch).logits, exported(batch).logits)
assert not [name for name in sys.modules if name.startswith("ambersafe")]
exec(open(f"{folder}/README.md").read().partition("```python\\n")[2].partition("```")[0], {})
print("equal")
"""


def alone(folder: Path, model: Path, checkpoint: Path, dtype: str) -> None:  # noqa: F811
    """Compare an exported folder with its checkpoint, and follow its card, in a process without anything of ours."""
    assert run_code(ALONE, folder, model, checkpoint, dtype, cwd=folder.parent).endswith("equal\n")


@pytest.fixture(scope="module")
def child() -> Any:
    """The script that runs under the training interpreter, as a module."""
    sys.path.insert(0, str(CHILDREN))
    import export_checkpoint  # type: ignore[import-not-found]

    return export_checkpoint


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:  # noqa: F811
    """A base model with a chat template, and a run folder that upstream made by hand, with other weights."""
    import torch
    import transformers

    base = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(model, base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    made = transformers.AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    state = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in made.state_dict().items()}
    run = tmp_path_factory.mktemp("runs") / "mine_1"
    (run / "LATEST").mkdir(parents=True)
    torch.save({"step_idx": 640, "state": state, "metrics": {"loss/eval": 1.25}}, run / "LATEST" / "policy.pt")
    config = {"loss": {"name": "sft"}, "model": {"name_or_path": str(base), "archive": None}, "lr": 1e-6}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return SimpleNamespace(base=base, run=run, checkpoint=run / "LATEST" / "policy.pt", state=state)


def left_beside(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if "ambersafe-" in path.name]


# --- the whole command ---


@pytest.mark.slow
def test_an_exported_run_loads_with_transformers_alone_and_its_card_can_be_followed(
    trained: SimpleNamespace, ambersafe: Ambersafe
) -> None:
    done = ambersafe("export", trained.run)
    folder = trained.run / "hugging_face"
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    assert "Traceback" not in done.stderr
    assert not left_beside(folder)
    alone(folder, trained.base, trained.checkpoint, "float32")
    card = (folder / "README.md").read_text()
    assert "after 640 training examples" in card
    assert "| loss | 1.25 |" in card


@pytest.mark.slow
def test_in_bfloat16_it_equals_the_checkpoint_in_bfloat16_and_what_cannot_be_pushed_is_there(
    trained: SimpleNamespace, ambersafe: Ambersafe, tmp_path: Path
) -> None:
    shutil.copyfile(trained.checkpoint, tmp_path / "policy.pt")
    given = ("--model", trained.base, "--dtype", "bfloat16", "--push", "hugging_face", "--json")
    done = ambersafe("export", tmp_path / "policy.pt", *given, env={"HF_HUB_OFFLINE": "", "HF_TOKEN": ""})
    assert done.returncode == 79
    folder = tmp_path / "hugging_face"
    assert f"nobody is logged in at https://huggingface.co. The folder is there: {folder}" in done.stderr
    answer = json.loads(done.stdout)
    assert (answer["folder"], answer["dtype"], answer["url"]) == (str(folder), "bfloat16", None)
    assert answer["files"] == sorted(path.name for path in folder.iterdir())
    assert answer["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert 'name = "hugging_face"' in (folder / "README.md").read_text()
    alone(folder, trained.base, tmp_path / "policy.pt", "bfloat16")


@pytest.mark.slow
def test_killed_in_the_middle_there_is_no_folder_nor_a_process_and_the_next_one_makes_it(
    trained: SimpleNamespace, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "ambersafe_cli", "export", str(trained.run), "--out", str(folder)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    new = tmp_path / ".out.ambersafe-new"
    while not list(new.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    while list(reading(new)):
        time.sleep(0.01)
    assert new.exists()
    assert not (new / "tokenizer.json").exists(), "who wrote it ended with who asked for it"
    done = run_ambersafe("export", trained.run, "--out", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not left_beside(folder)
    assert checkpoints.model_shapes(folder) == {name: tuple(t.shape) for name, t in trained.state.items()}


def reading(folder: Path) -> Iterator[str]:
    """The processes that were told of a folder, or have a file in it open."""
    for place in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = str(place.readlink())
        except OSError:
            continue
        if found.startswith(str(folder)):
            yield found


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_told_by_names_and_shapes_and_nothing_is_replaced(
    trained: SimpleNamespace, ambersafe: Ambersafe, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained.base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 100, "num_hidden_layers": 3}))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    done = ambersafe("export", trained.run, "--model", other, "--out", out, "--force")
    assert done.returncode == 66
    assert f"{trained.checkpoint} holds no weights of {other}: " in done.stderr
    assert "model.layers.0.mlp.gate_proj.weight is 344x128, not 100x128" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert not left_beside(out)


@pytest.mark.slow
def test_of_a_model_on_the_hub_config_and_tokenizer_are_fetched_and_then_there_without_a_network(
    trained: SimpleNamespace, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in trained.base.iterdir()}
    shutil.copyfile(trained.checkpoint, tmp_path / "policy.pt")
    given = ("export", tmp_path / "policy.pt", "--model", "org/tiny", "--force")
    env = {"HF_HOME": str(tmp_path / "home")}
    with serve(FakeHub({"models/org/tiny": {"main": files}})) as fake:
        online = {**env, "HF_ENDPOINT": fake.url, "HF_HUB_OFFLINE": ""}
        done = run_ambersafe(*given, cwd=tmp_path, env=online)
        assert done.returncode == 0, done.stderr
        assert "model.safetensors" not in {Path(path).name for path in fake.fetched()}
    made = {path.name: path.read_bytes() for path in (tmp_path / "hugging_face").iterdir()}
    assert made["tokenizer.json"] == files["tokenizer.json"]
    card = made["README.md"].decode()
    assert "base_model: org/tiny" in card
    assert f"at commit `{commit_of(files)}`. That is where its config was read" in card
    done = run_ambersafe(*given, cwd=tmp_path, env={**env, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "hugging_face").iterdir()} == made


@pytest.mark.slow
def test_peak_memory_beyond_imports_is_at_most_1_3_times_the_checkpoint(
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Of the process that reads the checkpoint: all that is resident, the mapped pages of the file too.

    What the same process takes for a checkpoint of almost nothing stands for imports and all else.
    """
    make_llama(tmp_path / "nothing", model, 0)
    size = make_llama(tmp_path / "large", model, 12)
    nothing = peak(tmp_path / "nothing", None)
    for dtype in (None, "bfloat16"):
        beyond = peak(tmp_path / "large", dtype) - nothing
        assert beyond > 0.5 * size, "the checkpoint is mapped, and that is counted"
        assert beyond < 1.3 * size


def make_llama(folder: Path, tokenizer: Path, layers: int) -> int:
    """Make the folder of a model with a policy.pt of random weights; return its size in bytes."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8
    )
    shutil.copytree(tokenizer, folder)
    (folder / "model.safetensors").unlink()
    config.save_pretrained(folder)
    state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    torch.save({"step_idx": 1, "state": state, "metrics": {}}, folder / "policy.pt")
    return (folder / "policy.pt").stat().st_size


def request(base: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    return {
        "checkpoint": str(base / "policy.pt"), "model": str(base), "revision": None, "tokenizer": str(base),
        "tokenizer_revision": None, "folder": str(folder), "dtype": None, "shard_bytes": 10**9,
        "buffers": checkpoints.BUFFER.pattern, "merge": False, "base": str(base), **changes,
    }  # fmt: skip


def peak(base: Path, dtype: str | None, **changes: Any) -> int:
    """The most bytes that are resident at a time in the process that exports. Its own, so that it is no other's; and
    glibc gives back what is freed, so that no holes in its heap count."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[2:], input=sys.argv[1].encode(), capture_output=True, check=True)\n"
        "assert b'\"answer\"' in done.stdout, done.stdout + done.stderr\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    folder = base.with_name(f"{base.name}-{dtype}")
    asked = json.dumps(request(base, folder, dtype=dtype, **changes))
    command = [sys.executable, "-c", code, asked, sys.executable, str(CHILDREN / "export_checkpoint.py")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


# --- every architecture: what the files hold ---

SIZES: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
INNER: dict[str, Any] = {**SIZES, "intermediate_size": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**INNER, "tie_word_embeddings": False}),
    "llama, tied": ("LlamaConfig", {**INNER, "tie_word_embeddings": True}),
    "gpt2, tied": ("GPT2Config", {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-neox, renamed in files": ("GPTNeoXConfig", INNER),
    "gpt-neox, tied": ("GPTNeoXConfig", {**INNER, "tie_word_embeddings": True}),
    "mixtral, other layout in files": (
        "MixtralConfig",
        {**INNER, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
}


def make(folder: Path, architecture: str, change: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Any:
    """Make a model with random weights, its config and a policy.pt, whose state can be changed; return the model."""
    import torch
    import transformers

    kind, values = ARCHITECTURES[architecture]
    config = getattr(transformers, kind)(**values)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in made.parameters():  # also those that begin as zeros or ones
        torch.nn.init.normal_(parameter, std=0.1)
    config.save_pretrained(folder)
    torch.save({"step_idx": 1, "state": change(made.state_dict()), "metrics": {}}, folder / "policy.pt")
    return made


def silent(step: str, done: float) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_the_checkpoint(
    architecture: str,
    child: Any,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    import torch
    import transformers

    made = make(tmp_path, architecture)
    asked = request(tmp_path, tmp_path / "out", tokenizer=str(model), shard_bytes=30_000)
    answer = child.main(asked, silent)
    export.require_whole(tmp_path / "out", answer, checkpoints.policy_shapes(tmp_path / "policy.pt"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert len(answer["left_out"]) == ("tied" in architecture)
    kept = {name for name in made.state_dict() if name not in answer["left_out"]}
    assert answer["renamed"] == (kept != answer["tensors"].keys())
    assert answer["renamed"] or "mixtral" not in architecture
    read: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    loaded, found = read
    assert not any(found.values())
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, made(ids).logits)
    words = [transformers.AutoTokenizer.from_pretrained(each) for each in (tmp_path / "out", model)]
    assert child.behaviour(words[0]) == child.behaviour(words[1]), "of another model than the config's"


@pytest.mark.slow
def test_files_are_those_that_transformers_itself_would_write(child: Any, model: Path, tmp_path: Path) -> None:  # noqa: F811
    for architecture in ("gpt-neox, renamed in files", "mixtral, other layout in files"):
        place = tmp_path / architecture
        make(place, architecture).save_pretrained(place / "theirs")
        child.main(request(place, place / "ours", tokenizer=str(model)), silent)
        theirs, ours = ((place / each / "model.safetensors") for each in ("theirs", "ours"))
        assert checkpoints.safetensors_entries(ours) == checkpoints.safetensors_entries(theirs)


@pytest.mark.slow
def test_checkpoints_of_older_versions_and_of_fsdp_are_taken(child: Any, model: Path, tmp_path: Path) -> None:  # noqa: F811
    import torch

    def as_in_transformers_4(state: dict[str, Any]) -> dict[str, Any]:
        state.setdefault("embed_out.weight", state.pop("lm_head.weight", None))
        attention = "gpt_neox.layers.0.attention."
        buffers = {"bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "masked_bias": torch.tensor(-1e9)}
        more = {f"{attention}{name}": buffer for name, buffer in buffers.items()}
        return {**state, **more, f"{attention}rotary_emb.inv_freq": torch.ones(4)}

    def as_of_fsdp(state: dict[str, Any]) -> dict[str, Any]:
        found = {name: tensor.clone() for name, tensor in state.items()}  # which parts what is tied
        for tensor in found.values():
            tensor.note = 1  # saved as a tensor of a class of its own
        return found

    for architecture, change, left_out in (
        ("gpt-neox, renamed in files", as_in_transformers_4, 3),
        ("llama, tied", as_of_fsdp, 1),
    ):
        place = tmp_path / architecture
        made = make(place, architecture, change)
        answer = child.main(request(place, place / "out", tokenizer=str(model)), silent)
        assert len(answer["left_out"]) == left_out
        export.require_whole(place / "out", answer, checkpoints.policy_shapes(place / "policy.pt"))
        loaded = type(made).from_pretrained(place / "out")
        assert all(bool(torch.equal(t, made.state_dict()[n])) for n, t in loaded.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("llama", lambda state: {n: t for n, t in state.items() if n != "lm_head.weight"}, "lm_head.weight is missing"),
        ("llama", lambda state: {**state, "x.weight": state["lm_head.weight"]}, "x.weight is not the model's"),
        ("llama", lambda state: {n: t[:7] for n, t in state.items()}, "lm_head.weight is 7x32, not 1024x32"),
        ("llama, tied", lambda state: {**state, "lm_head.weight": state["lm_head.weight"] + 1}, "which the model ties"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    child: Any,
    model: Path,  # noqa: F811
    tmp_path: Path,
    architecture: str,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
) -> None:
    make(tmp_path, architecture, change)
    with pytest.raises(child.Problem, match="holds no weights of") as raised:
        child.main(request(tmp_path, tmp_path / "out", tokenizer=str(model)), silent)
    assert raised.value.kind == "checkpoint"
    if "7x32" not in message:  # of which there are so many that only some are named
        assert message in str(raised.value)
    else:
        assert "more" in str(raised.value)
    assert not list((tmp_path / "out").iterdir())


def header_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        assert length % 8 == 0
        header: dict[str, Any] = json.loads(file.read(length))
    assert header.pop("__metadata__") == {"format": "pt"}
    return header


@pytest.mark.slow
def test_a_tokenizer_that_would_be_another_class_with_the_models_config_stays_what_it_is(
    child: Any,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    import transformers

    words = tmp_path / "words"
    words.mkdir()
    shutil.copyfile(model / "tokenizer.json", words / "tokenizer.json")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    (words / "tokenizer_config.json").write_text(json.dumps(config))
    (words / "config.json").write_text('{"model_type": "gpt_neox"}')
    kind: Any = transformers.AutoTokenizer
    wanted = child.behaviour(kind.from_pretrained(words))
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(words, tmp_path / "copied")
    shutil.copyfile(out / "config.json", tmp_path / "copied" / "config.json")
    assert child.behaviour(kind.from_pretrained(tmp_path / "copied")) != wanted, "or this shows nothing"
    child.write_tokenizer(str(out), str(words), "words")
    assert child.behaviour(kind.from_pretrained(out)) == wanted


@pytest.mark.slow
def test_a_file_of_weights_is_what_safetensors_reads_whatever_its_tensors_are(child: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "large": torch.randn(child.PIECE + 5, generator=generator),
        "turned": torch.randn(7, 5, generator=generator).T,
        "half": torch.randn(3, generator=generator).half(),
        "one": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "count": torch.arange(5),
    }
    for dtype in (None, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        written = sum(child.write_file(str(path), tensors, dtype))
        loaded = load_file(path)
        assert loaded.keys() == tensors.keys()
        assert written == sum(t.nbytes for t in loaded.values())
        for name, entry in header_of(path).items():
            assert entry["data_offsets"][0] % loaded[name].element_size() == 0, "where others map the file"
        for name, tensor in tensors.items():
            wanted = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            assert loaded[name].dtype == wanted.dtype
            assert torch.equal(loaded[name], wanted), name


@pytest.mark.slow
def test_numbers_that_a_dtype_does_not_have_are_an_error_and_what_was_infinite_is_not(
    child: Any, tmp_path: Path
) -> None:
    import torch

    with pytest.raises(ValueError, match="w holds numbers that are too large for float16"):
        list(child.write_file(str(tmp_path / "a"), {"w": torch.tensor([1.0, 70000.0])}, torch.float16))
    list(child.write_file(str(tmp_path / "b"), {"w": torch.tensor([1.0, float("inf"), float("nan")])}, torch.float16))


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_before_and_while_writing(
    child: Any, trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(trained.base, tmp_path / "out", checkpoint=str(trained.checkpoint))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, old[1]))
    try:
        with pytest.raises(child.Problem, match="The disk is full") as raised:
            child.main(asked, silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert raised.value.kind == "folder"
    monkeypatch.setattr(child.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(child.Problem, match=r"0\.0 GB are needed, and 0\.0 GB are free"):
        child.main(request(trained.base, tmp_path / "out2", checkpoint=str(trained.checkpoint)), silent)
    assert not list((tmp_path / "out2").iterdir())


@pytest.mark.slow
def test_the_config_keeps_what_the_model_says_and_the_tokenizers_files_are_the_same_bytes(
    child: Any, trained: SimpleNamespace, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(trained.base, base)
    config = json.loads((base / "config.json").read_text())
    own = {"torch_dtype": "float16", "_name_or_path": "/home/someone", "auto_map": {"AutoConfig": "x.Y"}, "note": [1]}
    (base / "config.json").write_text(json.dumps({**config, **own}))
    (base / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.5}')
    (base / "tokenizer.model").write_bytes(b"sentences")
    (base / "private_notes.txt").write_text("not a file of the tokenizer")
    out = tmp_path / "out"
    child.main(request(base, out, checkpoint=str(trained.checkpoint), dtype="bfloat16"), silent)
    found = json.loads((out / "config.json").read_text())
    assert found == {**config, "torch_dtype": "bfloat16", "dtype": "bfloat16", "note": [1]}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert (out / "chat_template.jinja").is_file()
    assert not (out / "private_notes.txt").exists()


# --- what is seen before anything costs ---


def test_the_folder_is_named_after_what_is_exported(trained: SimpleNamespace, tmp_path: Path) -> None:
    weights, checkpoint = export.find(str(trained.run), None)
    assert export.default_folder(weights, checkpoint) == trained.run / "hugging_face"
    assert export.default_folder(weights, trained.run / "policy.pt") == trained.run / "hugging_face"
    step = trained.run / "step-20" / "policy.pt"
    assert export.default_folder(weights, step) == trained.run / "hugging_face-step-20"
    assert export.default_folder(weights, step, merge=True) == trained.run / "hugging_face-merged-step-20"
    shutil.copyfile(trained.checkpoint, tmp_path / "policy.pt")
    weights, checkpoint = export.find(str(tmp_path / "policy.pt"), str(trained.base))
    assert export.default_folder(weights, checkpoint) == tmp_path / "hugging_face"
    with pytest.raises(UsageError, match="no checkpoint"):
        export.find(str(trained.base), None)


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        (("RUN", "--private"), 64, "--private is about the repository of --push"),
        (("RUN", "--push", "a b"), 64, "--push takes the name of a repository"),
        (("RUN", "--dtype", "int8"), 64, "Invalid value for '--dtype'"),
        (
            ("RUN", "--out", "out", "--model", "org/none"),
            77,
            "The model org/none is not in the Hugging Face cache, and HF_HUB_OFFLINE",
        ),
        (("RUN", "--out", "out", "--model", "/no/model"), 77, "There is no model /no/model"),
        (("RUN", "--out", "full"), 64, "full is not empty"),
        (("RUN", "--out", "full/mine"), 64, "full/mine is a file"),
        (("RUN", "--out", ".", "--force"), 64, "is where you work"),
        (("RUN", "--out", "full/mine/out"), 79, "Cannot write"),
        (("RUN", "--out", "/proc/out"), 79, "Cannot write /proc/out"),
        (("cut.pt", "--model", "BASE"), 66, "cut.pt is not a whole checkpoint of upstream's"),
        (("flipped.pt", "--model", "BASE"), 66, "flipped.pt: a byte of it is not what was written"),
        (("cut.pt",), 64, "nothing says what model it is of"),
        (("BASE",), 64, "names a model as it was published"),
        (("RUN", "--out", "out", "--merge"), 64, "holds whole weights, no adapter"),
        (("no_such_run",), 64, "There is no run no_such_run"),
    ],
)
def test_what_cannot_be_exported_is_one_message_and_leaves_everything_as_it_was(
    trained: SimpleNamespace,
    ambersafe: Ambersafe,
    tmp_path: Path,
    given: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    work = tmp_path / "work"
    (work / "full").mkdir()
    (work / "full" / "mine").write_text("kept")
    whole = trained.checkpoint.read_bytes()
    (work / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (work / "flipped.pt").write_bytes(whole[:200_000] + bytes([whole[200_000] ^ 1]) + whole[200_001:])
    before = sorted(work.rglob("*"))
    names = {"RUN": str(trained.run), "BASE": str(trained.base)}
    done = ambersafe("export", *(names.get(word, word) for word in given))
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert sorted(work.rglob("*")) == before
    assert (work / "full" / "mine").read_text() == "kept"


def test_a_folder_that_does_not_hold_the_checkpoint_is_not_whole(tmp_path: Path) -> None:
    import struct

    for name, text in (("config.json", '{"dtype": "float32"}'), ("generation_config.json", "{}")):
        (tmp_path / name).write_text(text)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(weights)
    answer = {"dtype": "float32", "tensors": {"w": [[2], "F32"]}, "left_out": ["tied"], "renamed": False}
    export.require_whole(tmp_path, answer, {"w": (2,), "tied": (2,)})
    for wrong, policy in (
        ({"dtype": "bfloat16"}, {"w": (2,)}),
        ({"tensors": {"w": [[2], "BF16"]}}, {"w": (2,)}),
        ({"tensors": {"w": [[3], "F32"]}}, {"w": (3,)}),
        ({}, {"w": (2,), "x": (1,)}),
        ({}, {"w": (1, 2)}),
        ({"renamed": True}, {"other": (3,)}),
    ):
        with pytest.raises(ExportError, match="does not hold"):
            export.require_whole(tmp_path, {**answer, **wrong}, policy)
    (tmp_path / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ExportError, match="cannot be read again"):
        export.require_whole(tmp_path, answer, {"w": (2,)})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="does not hold"):
        export.require_whole(tmp_path, answer, {"w": (2,)})


def test_a_model_is_taken_at_the_commit_of_the_run_and_from_where_it_is_now(
    trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"stage": "sft", "model": {"name": "org/x", "revision": "v1", "commit": None}, "values": {}}
    words = {**record, "values": {"model.tokenizer_name_or_path": "org/words"}}
    for found, tokenizer in ((record, ("org/x", "a" * 40)), (words, ("org/words", None))):
        monkeypatch.setattr(models, "run_of", lambda path, found=found: runs.Run(tmp_path, found, "died"))
        (tmp_path / "train.log").write_text(f"resolved model org/x to revision {'a' * 40}\n")
        weights, checkpoint = export.find(str(trained.checkpoint), None)
        assert checkpoint == trained.checkpoint
        assert (weights.model, weights.revision) == ("org/x", "a" * 40), "by the log, as it was killed"
        assert (weights.tokenizer, weights.tokenizer_revision) == tokenizer
        weights, _ = export.find(str(trained.checkpoint), str(trained.base))
        assert (weights.model, weights.revision) == (str(trained.base), None)
        assert weights.tokenizer == (str(trained.base) if found is record else "org/words")


def test_where_packages_are_missing_the_interpreter_of_the_run_is_named_and_not_started(
    tmp_path: Path, trained: SimpleNamespace
) -> None:
    bare, named = tmp_path / "bare", tmp_path / "named"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    named.write_text(f"#!/bin/sh\ntouch {tmp_path / 'proof'}\n")
    for program in (bare, named):
        program.chmod(0o755)
    weights, _ = export.find(str(trained.run), None)
    run = runs.Run(tmp_path, {"command": [str(named), "train.py"]}, "finished")
    with pytest.raises(TrainingEnvironmentError) as raised:
        as_trained.require_packages(str(bare), [replace(weights, run=run)], [])
    assert f"--python {named}, which trained this" in raised.value.hint
    assert not (tmp_path / "proof").exists()
