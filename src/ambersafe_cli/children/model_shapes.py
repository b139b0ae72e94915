"""Tell the shape of each tensor of a model, from its config alone: no weights are read or made.

Runs under the training interpreter. The request: model (a name on the hub, or a folder), revision (or null). The
answer: the shapes by name, each a list of sizes; a tied output layer is the embedding and not listed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ambersafe_cli.children.answering import Problem, Progress, answer, innermost
else:
    from answering import Problem, Progress, answer, innermost


def shapes(request: dict[str, Any], progress: Progress) -> dict[str, list[int]]:
    import torch
    import transformers

    progress("the model's config", 0.0)
    try:
        config = transformers.AutoConfig.from_pretrained(request["model"], revision=request["revision"] or "main")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise Problem("model", f"{request['model']}: {innermost(error)}") from error
    return {name: list(weights.shape) for name, weights in model.named_parameters()}


if __name__ == "__main__":
    answer(shapes)
