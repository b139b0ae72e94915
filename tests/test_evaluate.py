"""`ambersafe evaluate` and `sample` with a tiny model: what the children compute, and what the commands make of it."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Ambersafe
from test_real_upstream import model  # noqa: F401, a fixture

from ambersafe_cli import as_trained, asking, demo, errors

pytestmark = pytest.mark.slow

CHILDREN = Path(demo.__file__).parent / "children"
SETTINGS = {
    "max_length": 128,
    "max_prompt_length": 64,
    "keep_eos": False,
    "drop_eos": False,
    "shuffle_pairs": False,
    "template": None,
}
CATEGORIES = ("Violence", "Theft", "Drugs")

Child = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def checkpoints(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:  # noqa: F811
    """Two policy.pt of the tiny model, whose weights differ from its own and from each other."""
    import torch
    import transformers

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        state = {name: value + 0.05 * torch.randn_like(value) for name, value in loaded.state_dict().items()}
        path = tmp_path_factory.mktemp("weights") / "policy.pt"
        torch.save({"step_idx": 96, "state": state, "metrics": {"rewards_eval/margins": 123.0}}, path)
        found.append(path)
    return found[0], found[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve of the demo's rows, two for each of six prompts, with harm categories; and two that hold the EOS."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.loads(line) for line in (demo.DATA / "test.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["is_response_0_safe"] != line["is_response_1_safe"]][:14]
    for number, line in enumerate(lines):
        line["prompt"] = lines[number // 2 * 2]["prompt"]
        for side in (0, 1):
            holds = {
                c: (number + side) % 3 == i and not line[f"is_response_{side}_safe"] for i, c in enumerate(CATEGORIES)
            }
            line[f"response_{side}_harm_category"] = holds
        if number >= 12:
            line["response_0"] += "</s>"
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    """Import a script of the folder `children` into this process, as it finds its siblings when it is run."""
    monkeypatch.syspath_prepend(str(CHILDREN))
    yield importlib.import_module
    for name in ("score_pairs", "generate", "load_policy", "adapters", "answering", "preference_datasets", "utils"):
        sys.modules.pop(name, None)


def weights(model: Path, checkpoint: Path | None = None, **values: Any) -> dict[str, Any]:  # noqa: F811
    own = {"label": "it", "model": str(model), "revision": None, "tokenizer": str(model), "tokenizer_revision": None}
    return {
        **own,
        "checkpoint": checkpoint and str(checkpoint),
        "dtype": "float32",
        "casts_buffers": False,
        "autocast": None,
        "quantize": None,
        "adapter_dtype": "float32",
        "trained_rank": None,
        "merges": False,
        **values,
    }


def quiet(step: str, done: float) -> None:
    assert 0 <= done <= 1


# --- scores ---


def ask_scores(
    patched: Path, policy: dict[str, Any], reference: dict[str, Any] | None, **values: Any
) -> dict[str, Any]:
    return {
        "clone": str(patched),
        "datasets": ["saferlhf"],
        "split": "test",
        "limit": None,
        "texts": True,
        "batch_size": 4,
        "policy": policy,
        "reference": reference,
        "settings": SETTINGS,
        "evaluation": None,
        **values,
    }


def straight(model: Path, checkpoint: Path | None, prompt: str, response: str) -> tuple[float, int]:  # noqa: F811
    """The log-probability of a response and its tokens, with nothing but transformers."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if checkpoint:
        loaded.load_state_dict(torch.load(checkpoint, weights_only=True)["state"])
    start = tokenizer.encode(prompt, add_special_tokens=False)
    end = [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        logps = loaded(torch.tensor([start + end])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(start) + i - 1, token]) for i, token in enumerate(end)), len(end)


def test_scores_are_those_of_a_straight_computation_whatever_the_batch_is(
    child: Child,
    patched: Path,
    model: Path,  # noqa: F811
    checkpoints: tuple[Path, Path],
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAFERLHF_DATASET", str(rows))
    request = ask_scores(patched, weights(model, checkpoints[0]), weights(model))
    answer = child("score_pairs").work(request, quiet)
    assert len(answer["pairs"]) == 12
    assert answer["left_out"] == 2, "those that hold the EOS"
    assert len({pair["prompt"] for pair in answer["pairs"]}) == 6
    for pair in answer["pairs"][::5]:
        for side, name in enumerate(("chosen", "rejected")):
            logp, tokens = straight(model, checkpoints[0], pair["prompt_text"], pair[name])
            assert pair["policy"][side] == pytest.approx(logp, abs=1e-3)
            assert pair["tokens"][side] == tokens
            assert pair["reference"][side] == pytest.approx(
                straight(model, None, pair["prompt_text"], pair[name])[0], abs=1e-3
            )
    one_by_one = child("score_pairs").work({**request, "batch_size": 1, "limit": 5}, quiet)
    for pair, alone in zip(answer["pairs"], one_by_one["pairs"], strict=False):
        assert alone["policy"] == pytest.approx(pair["policy"], abs=1e-3)


def test_categories_are_those_of_the_unsafe_response(
    child: Child,
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAFERLHF_DATASET", str(rows))
    answer = child("score_pairs").work(ask_scores(patched, weights(model), None), quiet)
    expected = {}
    for line in (rows / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        unsafe = 1 if row["is_response_0_safe"] else 0
        holds = [name for name, value in row[f"response_{unsafe}_harm_category"].items() if value]
        expected[row["prompt"], row[f"response_{unsafe}"]] = holds
    found = {(pair["prompt_text"], pair["rejected"]): pair["categories"] for pair in answer["pairs"]}
    assert found == {key: expected[key] for key in found}
    assert {name for names in found.values() for name in names} == set(CATEGORIES)


def other_tokenizer(model: Path, folder: Path, tokens: int) -> Path:  # noqa: F811
    """The same model with more tokens in its tokenizer."""
    import transformers

    shutil.copytree(model, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<{number}>" for number in range(tokens)])
    tokenizer.save_pretrained(folder)
    return folder


def test_what_does_not_belong_together_is_refused(
    child: Child,
    patched: Path,
    model: Path,  # noqa: F811
    checkpoints: tuple[Path, Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setenv("SAFERLHF_DATASET", str(rows))
    other = other_tokenizer(model, tmp_path / "other", 9)
    (tmp_path / "torn.pt").write_bytes(checkpoints[0].read_bytes()[:5000])
    state = torch.load(checkpoints[0], weights_only=True)["state"]
    torch.save({"state": {name: value for name, value in state.items() if "norm" not in name}}, tmp_path / "less.pt")
    work, problem = child("score_pairs").work, child("answering").Problem
    for policy, reference, kind, message in (
        (weights(model), weights(other), "usage", "has another tokenizer"),
        (weights(other), None, "usage", "makes tokens up to"),
        (weights(model, tmp_path / "torn.pt"), None, "checkpoint", "torn.pt cannot be read"),
        (weights(model, tmp_path / "less.pt"), None, "checkpoint", "holds no weights of"),
        (weights(tmp_path), None, "model", "Cannot open the tokenizer"),
    ):
        with pytest.raises(problem, match=message) as refused:
            work(ask_scores(patched, policy, reference, limit=2), quiet)
        assert refused.value.kind == kind


def test_upstreams_examples_are_those_that_all_processes_take_of_its_batches(
    child: Child,
    patched: Path,
    model: Path,  # noqa: F811
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAFERLHF_DATASET", str(rows))
    settings = {**SETTINGS, "drop_eos": True}
    for processes, examples in ((1, 12), (3, 9)):
        wanted = {"stage": "dpo", "n_examples": 10, "batch_size": 4, "processes": processes}
        request = ask_scores(patched, weights(model), None, evaluation=wanted, settings=settings)
        found = child("score_pairs").work(request, quiet)["evaluation"]["examples"]
        assert len(found) == examples
    assert found[:3] == [pair["policy"] for pair in child("score_pairs").work(request, quiet)["pairs"][:3]]


def test_mixed_precision_has_its_buffers_in_that_type_too(child: Child, model: Path) -> None:  # noqa: F811
    import torch

    plain = {"mixed_precision": None, "model.fsdp_policy_mp": None, "model.policy_dtype": "float32"}
    config = {**plain, "trainer": "FSDPTrainer", "model.fsdp_policy_mp": "bfloat16"}
    assert as_trained.policy_precision(config) == as_trained.Precision("bfloat16", casts_buffers=True)
    assert as_trained.policy_precision({**config, "trainer": "BasicTrainer"}) == as_trained.Precision("float32")
    config = {**plain, "trainer": "FSDPTrainer", "mixed_precision": "bfloat16", "model.reference_dtype": "bfloat16"}
    assert as_trained.policy_precision(config) == as_trained.Precision("bfloat16")
    assert as_trained.reference_precision(config) == as_trained.Precision("bfloat16")
    config = {**config, "trainer": "BasicTrainer", "model.reference_dtype": "float32"}
    assert as_trained.policy_precision(config) == as_trained.Precision("float32", autocast="bfloat16")
    assert as_trained.reference_precision(config) == as_trained.Precision("float32", autocast="bfloat16")
    for casts_buffers, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        given = weights(model, dtype="bfloat16", casts_buffers=casts_buffers)
        loaded, _ = child("load_policy").load_model(given)
        assert {buffer.dtype for buffer in loaded.buffers()} == {wanted}
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


# --- answers ---


PROMPTS = ["Hi", "How do I change a light bulb safely?", "A", "Can I " + "really " * 30 + "do that?"]


def ask_answers(patched: Path, models: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    return {
        "clone": str(patched),
        "models": [{**each, "template": None} for each in models],
        "prompts": PROMPTS,
        "rows": None,
        "max_new_tokens": 12,
        "temperature": 0,
        "seed": 0,
        "batch_size": 4,
        **values,
    }


def test_greedy_answers_are_those_of_each_prompt_by_itself(
    child: Child,
    patched: Path,
    model: Path,  # noqa: F811
    checkpoints: tuple[Path, Path],
) -> None:
    """One by one, with a loop over the likeliest token in place of transformers' generate."""
    import torch
    import transformers

    answer = child("generate").work(ask_answers(patched, [weights(model, checkpoints[0])]), quiet)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.load_state_dict(torch.load(checkpoints[0], weights_only=True)["state"])
    for prompt, found in zip(PROMPTS, answer["answers"][0], strict=True):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        start = len(ids)
        while len(ids) < start + 12 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(loaded(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found["text"] == tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert found["stopped"] == (ids[-1] == tokenizer.eos_token_id)
        assert found["tokens"] == len(ids) - start - found["stopped"]


def test_a_seed_gives_the_same_answers_in_any_batch_and_another_seed_others(
    child: Child,
    patched: Path,
    model: Path,  # noqa: F811
) -> None:
    work = child("generate").work

    def texts(**values: Any) -> list[str]:
        few = {"prompts": PROMPTS[:3], "max_new_tokens": 6, **values}
        answer = work(ask_answers(patched, [weights(model)], temperature=0.8, **few), quiet)
        return [each["text"] for each in answer["answers"][0]]

    first = texts()
    assert first == texts(batch_size=1) == texts(batch_size=2)
    assert first != texts(seed=1)
    one, other = texts(prompts=["Hi", "Hi"])
    assert one != other, "each place has numbers of its own"


def test_sampling_is_by_the_probabilities_of_the_softmax(child: Child) -> None:
    import torch

    generate = child("generate")
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).repeat(500, 1)
    counts = torch.zeros(4)
    rows_ = [generate.generator_for(0, row) for row in range(500)]
    sampling = generate.SeededSampling(1.5, rows_)
    for _ in range(40):
        counts += torch.bincount(sampling(None, logits).argmax(-1), minlength=4)
    expected = (logits[0] / 1.5).softmax(-1)
    assert torch.allclose(counts / 20_000, expected, atol=0.02), (counts / 20_000, expected)


def test_an_answer_ends_at_the_eos_of_training_and_at_the_models_own(
    child: Child,
    patched: Path,
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    import transformers

    work = child("generate").work
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    (before,) = work(ask_answers(patched, [weights(model)], prompts=["Hi"]), quiet)["answers"][0]
    first = tokenizer.encode(before["text"], add_special_tokens=False)[0]
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": [first], "temperature": 9.0}))
    (after,) = work(ask_answers(patched, [weights(folder)], prompts=["Hi"]), quiet)["answers"][0]
    assert (after["text"], after["tokens"], after["stopped"]) == ("", 0, True)


def test_a_prompt_that_leaves_no_room_is_refused(child: Child, patched: Path, model: Path) -> None:  # noqa: F811
    work, problem = child("generate").work, child("answering").Problem
    with pytest.raises(problem, match="tokens, and with 12 new ones that is more than the 512"):
        work(ask_answers(patched, [weights(model)], prompts=["Hi", "word " * 600]), quiet)


# --- the commands ---


@pytest.fixture
def by_hand(model: Path, checkpoints: tuple[Path, Path], tmp_path: Path) -> Path:  # noqa: F811
    """The folder of a DPO run that upstream made without us."""
    folder = tmp_path / "work" / "mine"
    (folder / "LATEST").mkdir(parents=True)
    shutil.copy(checkpoints[0], folder / "LATEST" / "policy.pt")
    loss = "loss: {name: dpo, beta: 0.5}"
    names = f"model: {{name_or_path: {model}, archive: {checkpoints[1]}, reference_dtype: float32}}"
    sizes = "max_length: 128\nmax_prompt_length: 64\neval_batch_size: 4\nn_eval_examples: 10\ndrop_eos: true"
    (folder / "config.yaml").write_text(f"{loss}\n{names}\n{sizes}\ndatasets: [saferlhf]\n")
    return folder


def test_evaluate_keeps_what_it_shows_and_says_where_upstream_had_other_numbers(
    by_hand: Path, ambersafe: Ambersafe, patched: Path, rows: Path, tmp_path: Path
) -> None:
    given = ("evaluate", by_hand, "--data", rows, "--dir", patched, "--pairs", tmp_path / "pairs.jsonl")
    done = ambersafe(*given)
    assert done.returncode == 0, done.stderr
    kept = json.loads((by_hand / "evaluation.json").read_text())
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    margins = [0.5 * ((p["policy"][0] - p["reference"][0]) - (p["policy"][1] - p["reference"][1])) for p in pairs]
    assert kept["figures"]["reward_margin"]["value"] == pytest.approx(sum(margins) / 12)
    assert kept["figures"]["reward_accuracy"]["value"] == sum(margin > 0 for margin in margins) / 12
    assert f"{kept['figures']['reward_margin']['value']:.4f}" in done.stdout
    assert kept["reference"]["label"] == "archive"
    assert (kept["beta"], kept["data"]["pairs"], kept["data"]["prompts"], kept["data"]["left_out"]) == (0.5, 12, 6, 2)
    assert kept["by_category"].keys() == set(CATEGORIES)
    assert "Violence" in done.stdout
    # In upstream's order, 3 batches of 4 make up for 10 examples; its checkpoint says what was never so.
    assert kept["upstream"]["examples"] == 12
    assert kept["upstream"]["metrics"]["rewards_eval/margins"]["upstream"] == 123
    assert not kept["upstream"]["agrees"]
    assert "differs" in done.stdout
    assert {path.name for path in by_hand.iterdir()} == {"LATEST", "config.yaml", "evaluation.json"}

    again = ambersafe(*given)
    assert again.returncode == 64
    assert "pairs.jsonl exists" in again.stderr


def test_sample_takes_held_out_prompts_and_keeps_the_answers(
    by_hand: Path, ambersafe: Ambersafe, patched: Path, rows: Path
) -> None:
    env = {"SAFERLHF_DATASET": str(rows)}
    done = ambersafe("sample", by_hand, "--dir", patched, "--max-new-tokens", "5", "--json", env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first = json.loads((rows / "test.jsonl").read_text().splitlines()[0])["prompt"]
    assert found[0]["prompt"] == first
    assert [answer["label"] for answer in found[0]["answers"]] == ["base", "archive", "dpo"]
    assert all(answer["tokens"] <= 5 for each in found for answer in each["answers"])
    assert "nothing says which rows mine was trained on" in done.stderr
    kept = json.loads((by_hand / "samples.json").read_text())
    assert kept["samples"] == found
    assert [each["label"] for each in kept["models"]] == ["base", "archive", "dpo"]


def test_what_is_not_there_is_said_before_anything_is_loaded(
    by_hand: Path, ambersafe: Ambersafe, patched: Path, rows: Path, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    (tmp_path / "empty.txt").write_text("\n")
    on_rows = ("--data", rows, "--dir", patched)
    for arguments, status, message in (
        (("evaluate", by_hand), 77, "PKU-Alignment/PKU-SafeRLHF at v0 is not in the Hugging Face cache"),
        (("evaluate", by_hand, "--data", rows), 71, "There is no clone of upstream"),
        (("evaluate", by_hand, *on_rows, "--python", bare / "bin" / "python"), 73, "lacks torch"),
        (("evaluate", by_hand, "--data", "no.jsonl"), 65, "There is no file or folder no.jsonl"),
        (("evaluate", "org/model", *on_rows), 77, "model org/model is not in the Hugging Face cache"),
        (("evaluate", by_hand, "--reference", "nothing", *on_rows), 64, "There is no run nothing"),
        (("evaluate", checkpoints[0], *on_rows), 64, "nothing says what model it is of"),
        (("sample", by_hand, "--prompts", tmp_path / "empty.txt"), 65, "holds no prompt"),
        (("sample", by_hand, "--template", "x"), 64, "Invalid value for '--template'"),
    ):
        done = ambersafe(*arguments)
        assert done.returncode == status, (arguments, done.stderr)
        assert message in done.stderr
    assert {path.name for path in by_hand.iterdir()} == {"LATEST", "config.yaml"}


# --- the child ---


def marked(mark: str) -> list[int]:
    """The processes that have a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"EVALUATE_TEST={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def require_end(running: "subprocess.Popen[bytes]", mark: str, number: int, status: int) -> None:
    """Send a signal to the command, which has one child; look that both end."""
    assert len(marked(mark)) == 2
    running.send_signal(number)
    assert running.wait(timeout=60) == status
    deadline = time.monotonic() + 30
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not marked(mark)


def test_ctrl_c_ends_evaluate_and_its_child(by_hand: Path, patched: Path, rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ambersafe_cli", "evaluate", by_hand, "--data", rows, "--dir", patched]
    env = {**os.environ, "EVALUATE_TEST": str(tmp_path)}
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, cwd=tmp_path, env=env) as running:
        assert running.stderr
        assert any(b"reading the pairs" in line for line in running.stderr)
        require_end(running, str(tmp_path), signal.SIGINT, 130)
        assert b"Traceback" not in running.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_only_works_ends_with_who_asked(number: int, tmp_path: Path) -> None:
    shutil.copy(CHILDREN / "answering.py", tmp_path)
    (tmp_path / "child.py").write_text(
        "from answering import *\nimport time\n"
        "def work(request, progress):\n    progress('a step', 0)\n    time.sleep(600)\nanswer(work)\n"
    )
    code = (
        "import sys; from pathlib import Path; from ambersafe_cli import asking; "
        "asking._CHILDREN = Path(sys.argv[1]); asking.ask(sys.executable, 'child.py', {}, {}, 'test')"
    )
    env = {**os.environ, "EVALUATE_TEST": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=env) as running:
        assert running.stderr
        assert running.stderr.readline() == "test: a step …\n".encode()
        require_end(running, str(tmp_path), number, -number)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", errors.UsageError, "was killed"),
        ("import sys; sys.exit('it\\x1b is\\nbroken')", errors.TrainingEnvironmentError, "ended with 1: broken"),
        ("import sys; sys.stdin.read(); print('no JSON')", errors.TrainingEnvironmentError, "ended with"),
        ("from answering import *; answer(lambda *_: 1 / 0)", errors.AmberSafeError, "division by zero"),
        ("from answering import *; answer(lambda *_: [][0:0].x)", errors.AmberSafeError, "has no attribute 'x'"),
        ("from answering import *\ndef f(*_): raise MemoryError\nanswer(f)", errors.UsageError, "MemoryError"),
        (
            "from answering import *\ndef f(*_): raise Problem('data', 'no rows')\nanswer(f)",
            errors.DataError,
            "no rows.",
        ),
    ],
)
def test_a_child_that_fails_is_an_error_of_its_kind(
    code: str, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(CHILDREN / "answering.py", tmp_path)
    (tmp_path / "child.py").write_text(code)
    monkeypatch.setattr(asking, "_CHILDREN", tmp_path)
    with pytest.raises(kind, match=message) as failed:
        asking.ask(sys.executable, "child.py", {"x": "y" * 100_000}, {}, "test")
    assert type(failed.value) is kind


def test_what_upstreams_code_prints_does_not_reach_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(CHILDREN / "answering.py", tmp_path)
    (tmp_path / "child.py").write_text(
        "from answering import *\nimport os\n"
        "def work(request, progress):\n    print('noise'); os.system('echo noise')\n"
        "    progress('a step', 0.5)\n    return request\n"
        "answer(work)\n"
    )
    monkeypatch.setattr(asking, "_CHILDREN", tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert asking.ask(sys.executable, "child.py", {"é": "\x1b"}, {}, "test") == {"é": "\x1b"}
    assert capfd.readouterr().err == "test: a step …\n"
