"""What the data of a run means for it: too few examples, texts that hold the EOS, what is cut, dropped or lumped."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambersafe_cli import odd_rows
from ambersafe_cli.errors import DataError
from ambersafe_cli.findings import Finding

if TYPE_CHECKING:
    from ambersafe_cli.environment import TrainingEnvironment
    from ambersafe_cli.hub import Source
    from ambersafe_cli.recipe import Stage

SAMPLE = 5_000
"""How many examples of the train split are tokenized to measure what is cut; all of them if there are no more."""

_LOOK_AT_DATA = Path(__file__).parent / "children" / "look_at_data.py"
_SAFERLHF = Path(__file__).parent / "saferlhf.py"
_TEMPLATES = Path(__file__).parent / "templates.py"


def look_at_data(
    stage: "Stage", environment: "TrainingEnvironment", config: Mapping[str, Any], tokenizer: "Source"
) -> dict[str, Any]:
    """Have the training interpreter count and measure the rows; see children/look_at_data.py."""
    request = {
        "saferlhf": str(_SAFERLHF),
        "templates": str(_TEMPLATES),
        "template": config.get("template"),
        "tokenizer": tokenizer.name,
        "revision": tokenizer.revision,
        "stage": stage.name,
        "max_length": config["max_length"],
        "max_prompt_length": config["max_prompt_length"],
        "keep_eos": bool(config.get("keep_eos")),
        "drop_eos": bool(config.get("drop_eos")),
        "batch_size": config["batch_size"],
        "sample": SAMPLE,
    }
    rows = {"SAFERLHF_DATASET": stage.data, "SAFERLHF_REVISION": stage.data_revision or ""}
    return _ask(environment.python, request, rows)


def fingerprints(python: str, rows: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of each split of the rows that two environment variables name. Raises DataError."""
    answer = _ask(python, {"saferlhf": str(_SAFERLHF)}, rows)
    if "error" in answer:
        raise DataError(f"Cannot read {rows.get('SAFERLHF_DATASET')}: {answer['error']}")
    return {name: split["fingerprint"] for name, split in answer["splits"].items()}


def _ask(python: str, request: Mapping[str, Any], rows: Mapping[str, str]) -> dict[str, Any]:
    child = subprocess.run(
        [python, str(_LOOK_AT_DATA), json.dumps(request)],
        env={**os.environ, **rows},
        stdin=subprocess.DEVNULL,  # or a model with code of its own asks there whether to run it
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        answer = {"error": child.stderr.strip()}
    if not isinstance(answer, dict):
        return {"error": child.stdout}
    if "error" in answer:
        answer["error"] = odd_rows.explain(rows["SAFERLHF_DATASET"], str(answer["error"]))
    return answer


def of_data(stage: "Stage", config: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings about the rows, from what `look_at_data` answered."""
    if "error" in data:
        yield Finding(
            "error", f"Cannot read {stage.data}: {data['error']}", "`ambersafe data` tries again and says more."
        )
        return
    if data.get("not_rendered"):
        yield Finding(
            "error",
            f"The prompts cannot be rendered with the template {config['template']}: {data['not_rendered']}.",
            "--template hh and --template none need nothing of the tokenizer.",
        )
    if data["eos"] is None:
        yield Finding(
            "error",
            "The tokenizer has no EOS, which ends each response in training.",
            "Give its tokenizer_config.json an eos_token, or another --model.",
        )
    what = "prompts" if stage.name == "sft" else "pairs"
    for name, split in data["splits"].items():
        yield from _of_split(stage, config, name, split, data["eos"])
        yield from _of_pairs_alike(stage, name, split) if stage.name == "dpo" else ()
    train, test = data["splits"]["train"]["examples"], data["splits"]["test"]["examples"]
    yield from _of_counts(config, train, test, what)
    yield from _of_what_is_cut(config, data["splits"]["train"]["sampled"])
    yield from _of_batches(config, data["splits"]["train"], what)


def _of_split(
    stage: "Stage", config: Mapping[str, Any], name: str, split: Mapping[str, Any], eos: str | None
) -> Iterator[Finding]:
    where, what = f"{stage.data} ({name} split)", "prompts" if stage.name == "sft" else "pairs"
    if not split["pairs"]:
        yield Finding("error", f"{where}: none of {split['rows']} rows has exactly one safe response.", "")
    elif split["with_eos"] and config.get("drop_eos"):
        yield Finding(
            "warning", f"{where}: {split['with_eos']} {what} hold the tokenizer's EOS {eos!r} and are left out.", ""
        )
    elif split["with_eos"]:
        yield Finding(
            "error",
            f"{where}: {split['with_eos']} {what} hold the tokenizer's EOS {eos!r}, at which upstream stops while it "
            f"trains; the first has the prompt {split['first_with_eos'][:60]!r}.",
            "Add drop_eos=true behind the flags to leave them out, or take it out of the texts.",
        )


def _of_pairs_alike(stage: "Stage", name: str, split: Mapping[str, Any]) -> Iterator[Finding]:
    """A pair of equal responses has no margin to train, whatever its labels say."""
    if alike := split.get("alike"):
        verb = "pair has" if alike == 1 else "pairs have"
        yield Finding(
            "warning",
            f"{stage.data} ({name} split): {alike} {verb} the same text as chosen and as rejected.",
            "They teach nothing and hold the reward accuracy down; take them out of the rows.",
        )


def _of_counts(config: Mapping[str, Any], n_train: int, n_test: int, what: str) -> Iterator[Finding]:
    batch, eval_batch, n_eval = config["batch_size"], config["eval_batch_size"], config["n_eval_examples"] or 0
    if 0 < n_train < batch:
        yield Finding(
            "error",
            f"There are {n_train} {what} to train on, fewer than batch_size {batch}: no step is done.",
            f"Give --batch-size {n_train} or less.",
        )
    if 0 < n_test < eval_batch:
        yield Finding(
            "error",
            f"There are {n_test} {what} in the test split, fewer than eval_batch_size {eval_batch}: "
            "no evaluation can be done.",
            f"Add eval_batch_size={n_test} behind the flags, or less.",
        )
    elif 0 < n_test < n_eval:
        yield Finding(
            "warning",
            f"n_eval_examples is {n_eval}, but there are {n_test} {what} in the test split: "
            "an evaluation counts some of them twice.",
            f"Add n_eval_examples={n_test // eval_batch * eval_batch} behind the flags.",
        )
    if n_train > batch and n_train % batch and not config.get("fill_last_batch"):
        yield Finding(
            "warning",
            f"The last {n_train % batch} {what} of each epoch are dropped, as upstream does.",
            "fill_last_batch=true trains on them too.",
        )


def _of_what_is_cut(config: Mapping[str, Any], cut: Mapping[str, int]) -> Iterator[Finding]:
    if cut["responses_cut"] or cut["prompts_cut"]:
        mend = "A higher max_length keeps more"
        if not config.get("keep_eos"):
            mend += f"; keep_eos=true would cut {cut['tokens_lost_with_keep_eos']} tokens and lose no EOS"
        yield Finding(
            "warning",
            f"Of {cut['examples']} examples looked at, {cut['responses_cut']} have a response cut and "
            f"{cut['prompts_cut']} their prompt; {cut['eos_lost']} responses lose their EOS, "
            f"{cut['tokens_lost']} tokens are lost in all.",
            f"{mend}. After the cut, the longest has {cut['tokens_longest']} tokens.",
        )
    if cut["empty"]:
        yield Finding(
            "error", f"{cut['empty']} examples have no token of prompt or response left.", "Raise --max-length."
        )


def _of_batches(config: Mapping[str, Any], train: Mapping[str, Any], what: str) -> Iterator[Finding]:
    batch, prompts = config["batch_size"], train["prompts_a_batch"]
    if what == "pairs" and not config.get("shuffle_pairs") and prompts < 0.9 * min(batch, train["examples"]):
        yield Finding(
            "warning",
            f"A prompt's pairs stay next to each other: a batch of {batch} pairs holds {prompts} prompts (median).",
            "shuffle_pairs=true spreads them.",
        )
