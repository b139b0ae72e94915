"""What a template makes of an example, for whoever wants to see it before training."""

import json
import subprocess
from pathlib import Path

from ambersafe_cli import environment, hub, templates
from ambersafe_cli import recipe as recipes
from ambersafe_cli.errors import HubError, UsageError

_RENDER_EXAMPLE = Path(__file__).parent / "children" / "render_example.py"
_TEMPLATES = Path(__file__).parent / "templates.py"


def tokenizer_of(recipe: recipes.Recipe, flags: recipes.Flags) -> hub.Source:
    """The tokenizer that training by a recipe and flags would use. Raises UsageError if they name no model."""
    config = {**recipe.values["sft"], **flags.values}
    if not config.get("model.name_or_path"):
        raise UsageError(f"The recipe {recipe.source} names no model.", "Give --model NAME_OR_PATH.")
    return hub.sources(config, "", None)[1]


def render(
    prompt: str, response: str, template: str | None, tokenizer: hub.Source | None, python: str
) -> tuple[str, str]:
    """A prompt and a response in the form of a template; chat needs a tokenizer, and asks the training interpreter.

    Raises HubError for a tokenizer that cannot be had, UsageError for one that has no chat template,
    TrainingEnvironmentError.
    """
    if template != "chat" or tokenizer is None:
        text, (answer,) = templates.render_template(prompt, [response], template, None)
        return text, answer
    child = environment.probe(python)
    child.require_packages()
    request = {
        "templates": str(_TEMPLATES),
        "template": template,
        "tokenizer": tokenizer.name,
        "revision": tokenizer.revision,
        "prompt": prompt,
        "responses": [response],
    }
    done = subprocess.run(
        [child.python, str(_RENDER_EXAMPLE)], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        found = {"error": done.stderr.strip(), "opened": False}
    if "error" not in found:
        return found["prompt"], found["responses"][0]
    if not found["opened"]:
        raise HubError(
            f"Cannot open the {tokenizer}: {found['error']}", "--model takes a folder, or a name on the hub."
        )
    raise UsageError(
        f"The prompts cannot be rendered with the template chat: {found['error']}.",
        "Give the --model whose tokenizer has one.",
    )
