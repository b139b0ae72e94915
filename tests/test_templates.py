"""The forms of a prompt: what `--template` asks for, what training makes of it, and what is found before it starts."""

import importlib
import inspect
import itertools
import json
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Ambersafe, only_run, run_ambersafe
from hypothesis import given
from hypothesis import strategies as st
from test_choices import write
from test_launch import data, model, read_json, runs_of  # noqa: F401, fixtures
from test_preflight import rows
from test_preflight import write as write_rows
from test_real_upstream import TINY, metric_lines
from test_real_upstream import model as tiny_model  # noqa: F401, a fixture

from ambersafe_cli import patches, recipe, runs, templates
from ambersafe_cli.errors import UsageError
from ambersafe_cli.overrides import Value

# As Qwen's, with the EOS of the tiny tokenizer in it.
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def chatty(tiny_model: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The demo's tiny Llama, with a chat template."""
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_model, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT}))
    return folder


# --- the function itself ---


@given(st.text(), st.builds(str.__add__, st.sampled_from(["", " ", "\n\t"]), st.text()))
def test_hh_is_upstreams_form_and_a_response_begins_with_one_space_more_only_if_with_none(
    prompt: str, response: str
) -> None:
    rendered, (answer,) = templates.render_template(prompt, [response], "hh", None)
    assert rendered == "\n\nHuman: " + prompt + "\n\nAssistant:"
    assert answer in (response, " " + response)
    assert (answer == response) == (response != response.lstrip())
    assert templates.render_template(prompt, [response], None, None) == (prompt, [response])


def test_chat_asks_the_tokenizer_for_one_message_and_leaves_responses_alone() -> None:
    asked = []

    def apply(messages: object, **options: object) -> str:
        asked.append((messages, options))
        return "rendered"

    tokenizer = types.SimpleNamespace(chat_template="x", name_or_path="m", apply_chat_template=apply)
    assert templates.render_template("p", ["a", " b"], "chat", tokenizer) == ("rendered", ["a", " b"])
    assert asked == [([{"role": "user", "content": "p"}], {"tokenize": False, "add_generation_prompt": True})]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer m has no chat template"):
        templates.render_template("p", ["a"], "chat", tokenizer)
    with pytest.raises(ValueError, match="unknown template alpaca"):
        templates.render_template("p", ["a"], "alpaca", tokenizer)


def test_what_training_runs_is_a_copy_of_it() -> None:
    (patch,) = [each for each in patches.read_series() if each.config_keys == ("template",)]
    added = "\n".join(line[1:] for line in patch.diff.splitlines() if line.startswith("+"))
    assert inspect.getsource(templates.render_template) in added


# --- asking for one ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template": "alpaca"}, "There is no template alpaca"),
        ({"template": "none"}, "There is no template none"),
        ({"template": False}, "There is no template False"),
        ({"template": ["hh"]}, r"There is no template \['hh'\]"),
        ({"template": "chat", "datasets": ["saferlhf", "shp", "hh"]}, "The prompts of shp, hh come in the form hh"),
        ({"template": "chat", "datasets": None}, "The prompts of hh come in the form hh"),
    ],
)
def test_a_template_that_cannot_be_had_is_refused_wherever_it_was_asked_for(
    tmp_path: Path, given: dict[str, Value], message: str
) -> None:
    path = tmp_path / "mine.yaml"
    both = {"model.name_or_path": "m", "exp_name": "e", "datasets": ["saferlhf"], **given}
    path.write_text(json.dumps({"both": both}))
    with pytest.raises(UsageError, match=message):
        recipe.resolve("sft", recipe.load(str(path)), recipe.Flags({}), ())
    texts = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    with pytest.raises(UsageError, match=message):
        recipe.resolve("sft", recipe.load("ambersafe"), recipe.Flags({}), texts)


def test_hh_may_be_asked_for_where_data_come_in_it() -> None:
    stage = recipe.resolve(
        "sft", recipe.load("ambersafe"), recipe.Flags({"template": "hh"}), ("datasets=[hh,saferlhf]",)
    )
    assert stage.get("template") == "hh"


@pytest.mark.parametrize(
    ("words", "value"), [(("--template", "chat"), "chat"), (("--template", "none"), None), (("template=hh",), "hh")]
)
def test_a_template_wins_over_the_recipes_is_recorded_and_goes_on_to_dpo(
    ambersafe: Ambersafe,
    fake_clone: Path,
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    words: tuple[str, ...],
    value: str | None,
) -> None:
    mine = tmp_path / "mine.yaml"
    other = "hh" if value == "chat" else "chat"
    mine.write_text(recipe.path_of("tiny").read_text().replace("both:\n", f"both:\n  template: {other}\n"))
    assert recipe.load(str(mine)).values["dpo"]["template"] == other
    done = ambersafe("sft", "--recipe", mine, "--model", model, "--data", data, "--no-preflight", *words)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stderr.partition("next: ambersafe ")[2].splitlines()[0])
    assert ambersafe(*command, "--no-preflight").returncode == 0
    for run in runs_of(fake_clone):
        assert read_json(run / "called.json")["config"]["template"] == value
        record = read_json(run / "run.json")
        assert runs.Run(run, record, "finished").setting("template") == value
        assert ("template" in record["values"]) == (words[0] == "--template")


# --- what training makes of it ---


@pytest.fixture(scope="module")
def upstreams(patched: Path) -> Iterator[Any]:
    """The preference_datasets of the clone."""
    sys.path.insert(0, str(patched))
    yield importlib.import_module("preference_datasets")
    sys.path.remove(str(patched))
    for name in ("preference_datasets", "utils"):
        del sys.modules[name]


class Batches:
    """Upstream's batches of one example, of these rows, with the tokenizer that has a chat template."""

    def __init__(self, upstreams: Any, model: Path) -> None:  # noqa: F811
        import transformers

        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
        self.tokenizer.pad_token_id = self.tokenizer.eos_token_id
        self.upstreams = upstreams

    def __call__(self, **options: Any) -> list[dict[str, Any]]:
        """Each batch's one example, tensors as lists."""
        common = {"names": ["saferlhf"], "silent": True, "n_epochs": 1, "batch_size": 1, "max_length": 64}
        found = self.upstreams.get_batch_iterator(tokenizer=self.tokenizer, **{**common, **options})
        return [{k: v[0] if isinstance(v, list) else v[0].tolist() for k, v in batch.items()} for batch in found]

    def ids(self, text: str) -> Any:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def batches(upstreams: Any, chatty: Path) -> Batches:
    return Batches(upstreams, chatty)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        (None, " Why? ", ("Because.", "\tNo.")),
        ("hh", "\n\nHuman:  Why? \n\nAssistant:", (" Because.", "\tNo.")),
        ("chat", "<s>user\n Why? </s>\n<s>assistant\n", ("Because.", "\tNo.")),
    ],
)
def test_examples_are_rendered_and_then_tokenized_apart_as_ever(
    batches: Batches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    text: str,
    answers: tuple[str, str],
) -> None:
    """In SFT and DPO, in the train and the test split: the ids of texts that are written out here."""
    rows = write(tmp_path / "rows", 2, prompt=" Why? ", response_0="Because.", response_1="\tNo.")
    monkeypatch.setenv("SAFERLHF_DATASET", str(rows))
    prompt, eos = batches.ids(text), batches.tokenizer.eos_token_id
    for sft_mode, split in itertools.product((True, False), ("train", "test")):
        element = batches(sft_mode=sft_mode, split=split, template=template)[0]
        assert element["prompt"] == text
        assert element["prompt_input_ids"] == prompt
        assert ("rejected_input_ids" in element) == (not sft_mode)
        for name, answer in zip(("chosen", "rejected"), answers if not sft_mode else answers[:1], strict=False):
            response = [*batches.ids(answer), eos]
            assert element[name] == text + answer
            assert element[f"{name}_input_ids"] == prompt + response
            assert element[f"{name}_labels"] == [-100] * len(prompt) + response
            assert element[f"{name}_attention_mask"] == [1] * len(prompt + response)
    special = [token for token in prompt if token in (eos, batches.tokenizer.bos_token_id)]
    assert len(special) == (3 if template == "chat" else 0), "those of the template, and no others"


@pytest.mark.slow
@pytest.mark.parametrize("keep_eos", [False, True])
def test_a_prompt_that_is_too_long_keeps_its_end_with_a_template_and_its_beginning_without(
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_eos: bool
) -> None:
    rows = write(tmp_path / "rows", 2, prompt=" ".join(map(str, range(100))))
    monkeypatch.setenv("SAFERLHF_DATASET", str(rows))
    for template, end in ((None, "0 1 2"), ("hh", "\n\nAssistant:"), ("chat", "</s>\n<s>assistant\n")):
        given = {"max_length": 40, "max_prompt_length": 20, "keep_eos": keep_eos}
        element = batches(template=template, **given)[0]
        kept, whole = element["prompt_input_ids"], batches.ids(element["prompt"])
        assert len(kept) == 20 if not keep_eos else 20 < len(kept) < 40
        assert kept == (whole[-len(kept) :] if template else whole[: len(kept)])
        assert end in batches.tokenizer.decode(kept)


@pytest.mark.slow
def test_a_text_that_holds_the_eos_is_dropped_or_refused_though_the_template_may_hold_it(
    batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write(tmp_path / "rows", 6)
    monkeypatch.setenv("SAFERLHF_DATASET", str(rows))
    for column in ("prompt", "response_0", "response_1"):
        row = {**json.loads((rows / "train.jsonl").read_text().splitlines()[0]), "prompt": f"another {column}"}
        row[column] += "</s>"
        with (rows / "train.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    for template in (None, "hh", "chat"):
        assert len(batches(template=template, drop_eos=True)) == 6
        assert len(batches(template=template, drop_eos=True, sft_mode=True)) == 7, "it sees no rejected response"
        with pytest.raises(AssertionError, match=r"Prompt contains EOS token: another prompt</s>$"):
            batches(template=template, shuffle=False)


@pytest.mark.slow
def test_data_that_come_in_the_form_hh_are_left_as_they_are_or_refused(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(name: str, *_: object, **__: object) -> dict[str, Any]:
        prompt = "raw" if name == "saferlhf" else f"formed by {name}"
        return {prompt: {"responses": ["a", "b"], "pairs": [(0, 1)], "sft_target": "a"}}

    monkeypatch.setattr(batches.upstreams, "get_dataset", one)
    found = batches(names=["saferlhf", "hh", "shp", "se"], template="hh", shuffle=False)
    formed = [(f"formed by {name}", "a") for name in recipe.COME_AS_HH]
    shown = [(element["prompt"], element["chosen_response_only"]) for element in found]
    assert shown == [("\n\nHuman: raw\n\nAssistant:", " a"), *formed]
    for name in recipe.COME_AS_HH:
        with pytest.raises(ValueError, match=f"the prompts of {name} come in the form hh, template=chat cannot be"):
            batches(names=["saferlhf", name], template="chat")
    batches.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        batches(template="chat")


@pytest.mark.slow
def test_training_with_hh_is_training_on_rows_that_were_written_in_it(
    patched: Path,
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """To every printed digit; and where DPO would take another template than the SFT run had, that is told."""
    raw, formed = write_rows(tmp_path / "raw", rows(40), rows(16)), tmp_path / "formed"
    shutil.copytree(raw, formed)
    for path in formed.glob("*.jsonl"):
        written = [json.loads(line) for line in path.read_text().splitlines()]
        for row in written:
            row["prompt"] = f"\n\nHuman: {row['prompt']}\n\nAssistant:"
            row |= {name: f" {row[name]}" for name in ("response_0", "response_1")}
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
    common = ("--dir", patched, "--model", tiny_model, *TINY, "max_length=100", "max_prompt_length=50", "n_epochs=1")
    outputs = {}
    for name, template in (("raw", "hh"), ("formed", "none")):
        given = (*common, "--data", tmp_path / name, "--template", template, "--exp-name", name)
        done = run_ambersafe("sft", *given, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs[name] = metric_lines(done.stdout)
    assert len(outputs["raw"]) == 4
    assert outputs["raw"] == outputs["formed"]
    run = only_run(tmp_path, "raw")
    assert "\ntemplate: hh\n" in (run / "config.yaml").read_text()

    dpo = ("check", "dpo", *common, "--data", raw, "--archive", run)
    warning = f"{run.name}, which this starts from, was trained with the template hh, this run has none."
    assert warning in run_ambersafe(*dpo, cwd=tmp_path).stderr
    assert "was trained with the template" not in run_ambersafe(*dpo, "template=hh", cwd=tmp_path).stderr


# --- what is found before it starts ---


@pytest.mark.slow
def test_preflight_measures_rendered_prompts_and_names_a_tokenizer_that_cannot_render_them(
    patched: Path,
    batches: Batches,
    chatty: Path,
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = write(tmp_path / "rows", 48)
    monkeypatch.setenv("SAFERLHF_DATASET", str(rows))
    given = ("--json", "sft", "--dir", patched, "--recipe", "tiny", "--data", rows, "--model")
    raw = max(len(element["chosen_input_ids"]) for element in batches(sft_mode=True))
    for template in ("hh", "chat"):
        longest = max(len(element["chosen_input_ids"]) for element in batches(sft_mode=True, template=template))
        done = run_ambersafe("check", *given, chatty, "--template", template, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["data"]["splits"]["train"]["sampled"]["tokens_longest"] == longest > raw
    done = run_ambersafe("check", *given, tiny_model, "--template", "chat", cwd=tmp_path)
    assert done.returncode == 76
    assert "cannot be rendered with the template chat: the tokenizer" in done.stderr
    assert "has no chat template" in done.stderr


@pytest.mark.slow
def test_data_shows_the_first_example_as_training_sees_it(
    ambersafe: Ambersafe,
    chatty: Path,
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = write(tmp_path / "rows", 3)
    shown = ambersafe("data", "--data", rows, "--template", "hh").stdout
    assert 'prompt  "\\n\\nHuman: prompt number 0\\n\\nAssistant:"\nchosen  " a good answer 0"\n' in shown
    chat = ("data", "--data", rows, "--template", "chat")
    done = ambersafe(*chat, "--model", chatty, "--json")
    assert done.returncode == 0, done.stderr
    prompt = "<s>user\nprompt number 0</s>\n<s>assistant\n"
    assert json.loads(done.stdout)["example"] == {"template": "chat", "prompt": prompt, "chosen": "a good answer 0"}
    for words, status, message in (
        (("--model", tiny_model), 64, "has no chat template"),
        (("--model", "org/absent"), 77, "Cannot open the tokenizer of org/absent"),
        (("--recipe", "tiny"), 64, "The recipe tiny names no model"),
    ):
        done = ambersafe(*chat, *words)
        assert done.returncode == status, done.stderr
        assert message in done.stderr
        assert not done.stdout
