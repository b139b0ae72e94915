"""The forms that a prompt can be given: `render_template` here is the one source of that in patch 0025.

Imports nothing of ambersafe_cli: children run this file under the training interpreter. What training itself runs is
the copy in the clone's preference_datasets.py.
"""

from typing import Any

TEMPLATES = ("hh", "chat")


def render_template(prompt: str, responses: list[str], template: str | None, tokenizer: Any) -> tuple[str, list[str]]:
    """Return a prompt and its responses in the form that a template gives them; without one as they stand.

    hh is the form of get_hh, get_shp and get_se: Human and Assistant, and responses that begin with a space.
    chat is what the tokenizer's chat template makes of one message of the user; the responses follow as they stand.
    Such a prompt may hold special tokens, among them the EOS. For any other template the tokenizer is not looked at.
    Raises ValueError for a template that does not exist, and for a tokenizer that has no chat template.
    """
    if template is None:
        return prompt, responses
    if template == "hh":
        return f"\n\nHuman: {prompt}\n\nAssistant:", [r if r[:1].isspace() else f" {r}" for r in responses]
    if template != "chat":
        raise ValueError(f"unknown template {template}")
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no chat template")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), responses
