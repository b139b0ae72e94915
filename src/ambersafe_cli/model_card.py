"""The model card of an exported checkpoint: what was trained, how it is used, and what is known of it.

Front matter: https://huggingface.co/docs/hub/model-cards. What is not known is said; nothing is filled in.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ambersafe_cli import by_hand, checkpoints, models, origins, runs, show
from ambersafe_cli.origins import code, link, number

_UPSTREAMS_OWN = {"hh", "shp", "se"}
"""Datasets of upstream's, whose prompts come in the form of the template hh."""

_LIMITS = (
    "Training on preferences makes unsafe answers less likely and rules none of them out: prompts unlike those in the "
    "data, in other languages, or written to get around the training can still bring them forth. It may also have made "
    "the model refuse what is harmless or answer worse in general, and nothing was measured but what stands under "
    "Evaluation, so test it on your own use before anybody relies on it."
)


@dataclass(frozen=True)
class Subject:
    """What a card is about: the weights; `name`, by which they can be loaded; what their policy.pt says of itself
    (`step`, the examples trained on, and `metrics`) and its fingerprint; the dtype and the number of parameters of the
    exported files; `base_commit`, at which the model's config was read, if it is on the hub; `adapter`, if it is a LoRA
    checkpoint, and whether it is merged into the model's weights, or is all that there is."""

    weights: models.Weights
    name: str
    step: int | None
    metrics: Mapping[str, Any]
    fingerprint: str | None
    dtype: str
    parameters: int
    base_commit: str | None
    adapter: checkpoints.Adapter | None = None
    is_merged: bool = False

    @property
    def is_adapter(self) -> bool:
        """Whether the files hold an adapter alone."""
        return self.adapter is not None and not self.is_merged


def render(subject: Subject) -> str:
    """The text of README.md."""
    stages = origins.stages_of(subject.weights.run)
    checkpoint = (
        f"The checkpoint, a `policy.pt`, has the fingerprint {code(subject.fingerprint)}: a SHA-256 of the names, "
        "sizes and CRC-32 of what it holds."
    )
    parts = [
        _front_matter(subject, stages),
        _summary(subject, stages),
        "## Use",
        *_use(subject),
        "## Data",
        *origins.data(stages),
        "## Training",
        *origins.training(stages),
        "## Evaluation",
        *_evaluation(subject),
        "## Provenance",
        "\n".join(f"- {line}" for line in (checkpoint, *origins.provenance(stages))),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(subject: Subject, stages: list[runs.Run]) -> str:
    names = list(dict.fromkeys(filter(None, map(origins.data_name, stages))))
    known = [origins.LICENCES[name] for name in names if name in origins.LICENCES]
    library, relation = ("peft", "adapter") if subject.is_adapter else ("transformers", "finetune")
    matter: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if origins.is_on_hub(subject.weights.model):
        matter |= {"base_model": subject.weights.model, "base_model_relation": relation}
    if on_hub := [name for name in names if origins.is_on_hub(name)]:
        matter["datasets"] = on_hub
    matter["license"] = known[0] if known else "unknown"
    matter["tags"] = [*(str(run.record["stage"]) for run in stages), "safety", "alignment", "ambersafe-cli"]
    if subject.adapter:
        matter["tags"] += ["lora"]
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def _summary(subject: Subject, stages: list[runs.Run]) -> str:
    recorded = origins.commit_of(stages[0], "model") if stages else None
    commit = recorded or subject.base_commit
    lines = [f"Base model: {link(subject.weights.model)}{f', at commit {code(commit)}' if commit else ''}."]
    if commit and not recorded:
        lines.append("That is where its config was read; which commit the training began with is not recorded.")
    if stages:
        what = [origins.name_of(run) + _loss(run) for run in stages]
        lines.append(
            f"It was trained with {' and then '.join(what)} by the reference implementation of "
            "[Direct Preference Optimization](https://arxiv.org/abs/2305.18290)."
        )
        if stages[0].record["stage"] == "dpo":
            lines.append("Whether it was fine-tuned before that is not recorded here.")
    else:
        lines.append("How and on what it was trained is not recorded beside its checkpoint.")
    examples = f", as they were after {subject.step:,} training examples" if subject.step else ""
    of_stage = " of the last stage" if examples and len(stages) > 1 else ""
    of_adapter = " of an adapter (LoRA)" if subject.is_adapter else ""
    lines.append(f"These are {subject.parameters:,} parameters{of_adapter} in {subject.dtype}{examples}{of_stage}.")
    lines += _adapter(subject)
    after = f", after {' and '.join(map(origins.name_of, stages))}" if stages else ", trained"
    return f"# {origins.plain(Path(subject.weights.model).name)}{after}\n\n{' '.join(lines)}"


_QUANTIZED = {"4bit": "4 bits (NF4 with double quantization)", "8bit": "8 bits (LLM.int8)"}


def _adapter(subject: Subject) -> Iterator[str]:
    """What there is to say of the weights below an adapter, and of how it was merged."""
    if subject.adapter is None:
        return
    if subject.is_merged:
        on = (
            "the weights, fully fine-tuned, that it was trained on" if subject.adapter.on else "those of the base model"
        )
        yield f"An adapter ([LoRA](https://arxiv.org/abs/2106.09685)) was trained, and added here to {on} in float32."
    if bits := subject.adapter.quantize:
        here = "here they are not" if subject.is_merged else "on the base model as it was published they are not"
        yield (
            f"In training the weights below it were quantized to {_QUANTIZED[bits]}; {here}, and log-probabilities "
            "differ a little from those of the training."
        )


def _loss(run: runs.Run) -> str:
    beta = run.setting("loss.beta")
    if run.record["stage"] != "dpo" or not beta:
        return ""
    return f" ({'the loss of IPO, ' if run.setting('loss.name') == 'ipo' else ''}beta {origins.plain(beta)})"


_TEMPLATES: Mapping[str | None, tuple[str, str]] = {
    None: ('text = "How do I keep my house warm?"', "The text of a prompt was taken as it stands, without a template."),
    "hh": (
        'prompt = "How do I keep my house warm?"\ntext = f"\\n\\nHuman: {prompt}\\n\\nAssistant:"',
        "Prompts had the form `\\n\\nHuman: {prompt}\\n\\nAssistant:`, and a response begins with a space.",
    ),
    "chat": (
        'messages = [{"role": "user", "content": "How do I keep my house warm?"}]\n'
        "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
        "Prompts had the form of the tokenizer's chat template, as one message of the user.",
    ),
}
"""By the template of a run: the lines that make a text of a prompt, and what there is to say."""


_MODEL_LOADING = (
    ["from transformers import AutoModelForCausalLM, AutoTokenizer"],
    ["model = AutoModelForCausalLM.from_pretrained(name)"],
)
_ADAPTER_LOADING = (
    ["from peft import PeftConfig, PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"],
    [
        "config = PeftConfig.from_pretrained(name)",
        "base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, revision=config.revision)",
        "model = PeftModel.from_pretrained(base, name)",
    ],
)
"""What is imported for, and what loads, a model and an adapter."""


def _use(subject: Subject) -> Iterator[str]:
    run, template = subject.weights.run, subject.weights.template
    own = run.setting("datasets") if run else None
    if template is None and isinstance(own, list) and own and set(map(str, own)) <= _UPSTREAMS_OWN:
        template = "hh"
    lines, words = _TEMPLATES.get(template, _TEMPLATES[None])
    imports, loading = _ADAPTER_LOADING if subject.is_adapter else _MODEL_LOADING
    yield "\n".join(
        [
            "```python",
            *imports,
            "",
            f"name = {json.dumps(subject.name)}",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            *loading,
            "",
            lines,
            'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
            "output = model.generate(**inputs, max_new_tokens=128, pad_token_id=tokenizer.eos_token_id)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
            "```",
        ]
    )
    if run is None:
        words = "Which form the prompts of the training had is not recorded."
    limits = [
        f"{what} to {run.setting(key):,} tokens"
        for key, what in (("max_prompt_length", "prompts"), ("max_length", "prompt and response together"))
        if run and isinstance(run.setting(key), int)
    ]
    cut = f" What was longer was cut: {', '.join(limits)}." if limits else ""
    yield (
        f"{words} In training no BOS is added (`add_special_tokens=False`), prompt and response are tokenized apart "
        f"from each other, and the EOS ends a response.{cut}"
    )


def _evaluation(subject: Subject) -> Iterator[str]:
    found = subject.metrics or _last_metrics(subject)
    rows = [
        f"| {origins.plain(key.replace('_eval', '').replace('/eval', ''))} | {number(value)} |"
        for key, value in found.items()
        if isinstance(value, int | float)
    ]
    if not rows:
        yield "No evaluation of these weights is recorded."
        return
    yield "\n".join(["| on held-out rows | |", "|---|--:|", *rows])
    words = "The loss is in nats, summed over a response."
    if any(key.startswith("rewards") for key in found):
        words = (
            "The loss is in nats a pair. A reward is beta times what a response has gained in log-probability since "
            "DPO began; accuracy is how often the chosen response has the larger one of a pair."
        )
    yield f"{words} No other benchmark was run."


def _last_metrics(subject: Subject) -> Mapping[str, Any]:
    """What the run's record says of its final weights, if these are they."""
    run, checkpoint = subject.weights.run, subject.weights.checkpoint
    if run is None or run.status == by_hand.STATUS or checkpoint != runs.checkpoint(run.folder):
        return {}
    return show.last_metrics(run)
