"""Open a model's config, or its tokenizer, without running code of its own: an error says that it takes that.

Runs under the training interpreter. The request: part (model or tokenizer), folder. The answer is empty.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ambersafe_cli.children.answering import Problem, Progress, answer, innermost
else:
    from answering import Problem, Progress, answer, innermost


def open_it(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    import torch
    import transformers

    kinds: Any = transformers
    progress(f"the {request['part']}", 0.0)
    try:
        if request["part"] == "tokenizer":
            kinds.AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=False)
        else:
            config = kinds.AutoConfig.from_pretrained(request["folder"], trust_remote_code=False)
            with torch.device("meta"):
                kinds.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of whatever class its reader raises
        raise Problem("model", innermost(error).partition("\n")[0]) from error
    return {}


if __name__ == "__main__":
    answer(open_it)
