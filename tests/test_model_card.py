"""What a model card says of a run, and that it says nothing of what is not known, nor of the machine."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from ambersafe_cli import by_hand, model_card, models, origins, runs

PKU = "PKU-Alignment/PKU-SafeRLHF"
COMMITS = {"model": "a" * 40, "data": "b" * 40}


def record(stage: str, **changes: Any) -> dict[str, Any]:
    """What run.json says of a run of the recipe ambersafe that has finished."""
    recipe = {"loss": stage, "lr": 5e-7, "batch_size": 32, "model.name_or_path": "LLM360/AmberChat"}
    recipe |= {"datasets": ["saferlhf"], "max_length": 512, "max_prompt_length": 256}
    recipe |= {"loss.beta": 0.1} if stage == "dpo" else {}
    return {
        "stage": stage,
        "status": "finished",
        "started": "2026-11-24T01:02:03.000004+00:00",
        "ended": "2026-11-24T05:06:07.000008+00:00",
        "attempts": [],
        "model": {"name": "LLM360/AmberChat", "revision": None, "commit": COMMITS["model"]},
        "data": {
            "name": PKU,
            "revision": "v0",
            "commit": COMMITS["data"],
            "counts": {"train": {"rows": 330000, "prompts": 40000, "pairs": 100000}},
            "fingerprint": {"train": "c" * 64},
        },
        "archive": None,
        "archive_fingerprint": None,
        "recipe": {"source": "ambersafe", "description": "AmberSafe's own values", "values": {stage: recipe}},
        "values": {**recipe, "lr": 1e-6, "model.archive": "/home/someone/policy.pt", "wandb.enabled": True},
        "overrides": ["optimizer=SGD", "local_dirs=[/scratch/someone]"],
        "command": ["/home/someone/python", "train.py"],
        "processes": 8,
        "python": {
            "path": "/home/someone/python",
            "version": "3.11.7",
            "packages": {"torch": "2.13.0", "transformers": "5.23.0", "wandb": None},
            "gpus": ["NVIDIA A100"] * 8,
        },
        "upstream": {
            "folder": "/home/someone/clone",
            "url": "https://github.com/eric-mitchell/direct-preference-optimization.git",
            "base": "d" * 40,
            "head": "e" * 40,
            "edited": [],
            "on_top": [],
            "patches": {"0001-Add-the-saferlhf-dataset.patch": "applied", "0002-Other.patch": "missing"},
        },
        "ambersafe_version": "0.1.0",
        "last_metrics": {"loss/eval": 0.6, "rewards_eval/accuracies": 0.75},
        **changes,
    }


def card(folder: Path, found: dict[str, Any] | None, status: str = "finished", **changes: Any) -> str:
    """The card of the final weights of a run with this record, or of a policy.pt of none."""
    run = found and runs.Run(folder, found, status)
    model = str(found["model"]["name"]) if found else "LLM360/AmberChat"
    template = changes.pop("template", None)
    weights = models.Weights("dpo", model, None, model, None, runs.checkpoint(folder), template, run or None)
    values: dict[str, Any] = {
        "weights": weights, "name": "org/x", "step": 1234, "metrics": {}, "fingerprint": "f" * 64, "dtype": "float32",
        "parameters": 6738415616, "base_commit": "9" * 40, **changes,
    }  # fmt: skip
    return model_card.render(model_card.Subject(**values))


EVIL = "\n\n# Evil\n\n<script>alert(1)</script> ![x](http://evil/x) [y](javascript:z) ~~~\n```\n````\n|a|b|\n`<b>`"


def spoil(value: Any) -> Any:
    """Every text of a record, and every key in it that is another's to choose, with Markdown and HTML behind it."""
    if isinstance(value, dict):
        return {key: spoil(each) for key, each in value.items()} | {f"x{EVIL}": EVIL}
    if isinstance(value, list):
        return [*map(spoil, value), EVIL]
    return value + EVIL if isinstance(value, str) and value not in ("sft", "dpo") else value


def test_nothing_that_a_record_holds_is_markdown_or_html_in_the_card(tmp_path: Path) -> None:
    found = spoil(record("dpo", archive_fingerprint="1" * 64))
    found["last_metrics"] = {f"rewards_eval/{EVIL}": 0.5, "loss/eval": 0.6}
    found["overrides"] = []
    found["upstream"]["patches"] = {f"0001{EVIL}": "applied"}
    found["data"]["counts"] = {f"train{EVIL}": {"rows": 1, "prompts": 1, "pairs": 1}}
    found["values"]["loss.beta"] = EVIL
    text = card(tmp_path, found)
    front_matter(text)
    page = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert not re.search(r"<(script|img|b)\b|href=.javascript|http://evil/x\"", page), page
    headings = re.findall(r"<h\d>(.*?)</h\d>", page, re.DOTALL)
    assert headings[1:] == ["Use", "Data", "Training", "Evaluation", "Provenance", "Limits"]


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return dict(yaml.safe_load(matter))


def test_a_finished_run_is_told_in_full(tmp_path: Path) -> None:
    text = card(tmp_path, record("dpo", archive_fingerprint="1" * 64))
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "LLM360/AmberChat",
        "base_model_relation": "finetune",
        "datasets": [PKU],
        "license": "cc-by-nc-4.0",
        "tags": ["dpo", "safety", "alignment", "ambersafe-cli"],
    }
    for said in (
        f"https://huggingface.co/LLM360/AmberChat), at commit `{COMMITS['model']}`",
        "DPO (beta 0.1)",
        "1,234 training examples",
        f"revision `v0`, commit `{COMMITS['data']}`",
        f"| train | 330,000 | 40,000 | 100,000 | `{'c' * 64}` |",
        "is under CC-BY-NC-4.0",
        "the recipe `ambersafe`",
        "changed in `lr=1e-06`, `optimizer=SGD`.",
        "batch_size: 32",
        "| rewards/accuracies | 0.75 |",
        f"fingerprint `{'f' * 64}`",
        f"fingerprint `{'1' * 64}`",
        f"direct-preference-optimization at `{'d' * 40}`",
        f"patched by ambersafe-cli with 0001-Add-the-saferlhf-dataset, at `{'e' * 40}`",
        "8 x NVIDIA A100, in 8 processes",
        "torch 2.13.0, transformers 5.23.0",
        "prompts to 256 tokens, prompt and response together to 512 tokens",
    ):
        assert said in text, said
    assert "0002-Other" not in text
    assert "SHA-256 of the rows" in text


def test_nothing_of_the_machine_is_in_a_card(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    local = {"name": str(tmp_path / "rows"), "revision": None, "commit": None, "counts": None, "fingerprint": None}
    model = {"name": str(tmp_path), "revision": None, "commit": None}
    found = record("sft", data=local, model=model, recipe={"source": "/home/someone/mine.yaml", "values": {}})
    found["values"]["model.tokenizer_name_or_path"] = "/home/someone/words"
    found["upstream"]["url"] = "/home/someone/clone"
    text = card(tmp_path, found, base_commit=None)
    assert "someone" not in text
    assert str(tmp_path) not in text
    for kept in (f"`{tmp_path.name}`, a local folder", "`rows`, local data", "`mine.yaml`", "a local clone", "words"):
        assert kept in text
    matter = front_matter(text)
    assert matter["license"] == "unknown"
    assert not {"base_model", "datasets"} & matter.keys()
    assert "licence of the data is not known" in text


def test_both_stages_are_told_and_what_they_share_is_said_once(tmp_path: Path) -> None:
    sft, dpo = tmp_path / "sft_1", tmp_path / "dpo_1"
    for folder in (sft, dpo):
        folder.mkdir()
    runs.write(sft, {**record("sft"), "environment": {}, "next_command": ["ambersafe"], "upstream": _upstream()})
    text = card(dpo, {**record("dpo", archive=str(runs.checkpoint(sft))), "upstream": _upstream()})
    assert "# AmberChat, after SFT and DPO" in text
    assert "trained with SFT and then DPO (beta 0.1)" in text
    assert front_matter(text)["tags"][:2] == ["sft", "dpo"]
    assert text.count("SFT and DPO used ambersafe-cli 0.1.0") == 1
    assert text.count("0001-Add-the-saferlhf-dataset") == 1
    assert len(re.findall(r"is under CC-BY-NC-4\.0", text)) == 1


def _upstream() -> dict[str, Any]:
    return {**record("sft")["upstream"], "can_resume": True}


def test_data_of_an_unknown_licence_beside_known_data_takes_nothing_from_that(tmp_path: Path) -> None:
    sft = tmp_path / "sft_1"
    sft.mkdir()
    other = {"name": "org/other", "revision": None}
    runs.write(
        sft, {**record("sft", data=other), "environment": {}, "next_command": ["ambersafe"], "upstream": _upstream()}
    )
    text = card(tmp_path, record("dpo", archive=str(runs.checkpoint(sft))))
    assert front_matter(text)["license"] == "cc-by-nc-4.0"
    assert front_matter(text)["datasets"] == ["org/other", PKU]
    assert "The licence of the other data is not known" in text


def test_of_a_run_that_was_made_by_hand_it_is_said_what_is_not_recorded(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "loss: {name: dpo, beta: 0.3}\nmodel: {name_or_path: EleutherAI/pythia-2.8b, archive: /home/someone/p.pt}\n"
        "datasets: [hh]\nlr: 5e-7\nlocal_dirs: [/scr-ssd, .cache]\nwandb: {enabled: true, entity: someone}\n"
    )
    found = by_hand.read(tmp_path)
    assert found
    text = card(tmp_path, found, by_hand.STATUS)
    assert front_matter(text)["license"] == "unknown"
    for said in (
        f"`{'9' * 40}`. That is where its config was read; which commit the training began with is not recorded.",
        "DPO (beta 0.3)",
        "Whether it was fine-tuned before that is not recorded here.",
        "which its config calls `hh`, is not recorded",
        "with the settings of its config.yaml",
        "lr: 5.0e-07",
        "No evaluation of these weights is recorded.",
        "the versions of packages, and the machine are not recorded",
        r"Prompts had the form `\n\nHuman: {prompt}\n\nAssistant:`",
    ):
        assert said in text, said
    assert "someone" not in text
    assert "scr-ssd" not in text


def test_of_a_checkpoint_of_no_run_only_itself_is_told(tmp_path: Path) -> None:
    text = card(tmp_path, None, step=None, base_commit=None, metrics={"loss/eval": 1.5})
    assert "How and on what it was trained is not recorded" in text
    assert "| loss | 1.5 |" in text
    assert "Which form the prompts of the training had is not recorded." in text
    assert "Not recorded; so is its licence" in text
    assert "Nothing else is recorded beside the checkpoint." in text


@pytest.mark.parametrize(
    ("template", "line", "words"),
    [
        (None, 'text = "How do I keep my house warm?"', "without a template"),
        ("hh", r'text = f"\n\nHuman: {prompt}\n\nAssistant:"', "a response begins with a space"),
        ("chat", "text = tokenizer.apply_chat_template(messages, tokenize=False", "the tokenizer's chat template"),
    ],
)
def test_the_snippet_gives_prompts_the_form_of_the_training(
    tmp_path: Path, template: str | None, line: str, words: str
) -> None:
    text = card(tmp_path, record("dpo"), template=template)
    snippet = text.partition("```python\n")[2].partition("```")[0]
    compile(snippet, "snippet", "exec")
    assert line in snippet
    assert "add_special_tokens=False" in snippet
    assert 'name = "org/x"' in snippet
    assert words in text.partition("## Use")[2].partition("## Data")[0]


def test_the_evaluation_is_that_of_these_weights(tmp_path: Path) -> None:
    own = {"loss/eval": 0.5, "rewards_eval/margins": float("nan")}
    assert "| loss | 0.5 |\n| rewards/margins | nan |" in card(tmp_path, record("dpo"), metrics=own)
    weights = models.Weights("dpo", "m", None, "m", None, tmp_path / "step-20" / "policy.pt", None, None)
    run = runs.Run(tmp_path, record("dpo"), "finished")
    text = model_card.render(model_card.Subject(replace(weights, run=run), "x", 20, {}, None, "float32", 1, None))
    assert "No evaluation of these weights is recorded." in text, "the record's is of the final ones"


def test_a_record_that_lacks_what_other_versions_did_not_write_has_a_card_all_the_same(tmp_path: Path) -> None:
    whole = record("dpo")
    for key in whole.keys() - {"stage", "model", "started"}:
        for value in (None, "gone"):
            found = copy.deepcopy(whole)
            if value == "gone":
                del found[key]
            else:
                found[key] = value
            assert card(tmp_path, found).startswith("---\n"), key


@pytest.mark.parametrize("text", ["a`b", "a|b", "a\nb", "  "])
def test_what_others_have_named_stays_within_its_marks(text: str) -> None:
    assert re.fullmatch(r"`[^`|\n]*`", origins.code(text))


@pytest.mark.parametrize(("values", "said"), [({}, False), ({"lora": True}, True)])
def test_packages_of_adapters_are_named_where_there_is_one(tmp_path: Path, values: dict[str, Any], said: bool) -> None:
    found = record("sft")
    found["values"] |= values
    found["python"]["packages"] |= {"peft": "0.21.2", "bitsandbytes": "0.50.2"}
    text = card(tmp_path, found)
    assert ("peft 0.21.2" in text) == said
    assert "bitsandbytes" not in text
