"""Render one example by a template: `python render_example.py < REQUEST.json`, JSON on stdout.

Runs under the training interpreter. The request: templates (the path of templates.py), template, tokenizer (a folder,
or a name on the hub), revision, prompt, responses. The answer: prompt and responses; or `error`, what went wrong, and
`opened`, whether the tokenizer could be had.
"""

import json
import runpy
import sys
from typing import Any


def main() -> None:
    import transformers

    request = json.load(sys.stdin)
    opened = False
    try:
        kind: Any = transformers.AutoTokenizer
        tokenizer = kind.from_pretrained(request["tokenizer"], revision=request["revision"] or "main")
        opened = True
        render = runpy.run_path(request["templates"])["render_template"]
        prompt, responses = render(request["prompt"], request["responses"], request["template"], tokenizer)
        answer = {"prompt": prompt, "responses": responses}
    except Exception as error:  # of the hub, of transformers, of the chat template, which is a program of its own
        said = str(error).strip().partition("\n")[0].rstrip(".")
        answer = {"error": said or type(error).__name__, "opened": opened}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
