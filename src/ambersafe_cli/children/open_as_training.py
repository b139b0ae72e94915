"""Open a run's data and tokenizers as training does: `python open_as_training.py REQUEST.json-text`, JSON on stdout.

Runs under the training interpreter, with a network to fill the caches, or with HF_HUB_OFFLINE=1 to see that they are.
The request: saferlhf (the path of saferlhf.py) and sources, each a part (model, tokenizer or data), a name on the hub
and a revision. The rows come from where SAFERLHF_DATASET says. The answer: of data the commit, the folder, its files
and bytes, if there is data; or `error`: the index of the source, the classes and error numbers of the chain of
exceptions, and what the first cause said.
"""

import json
import os
import runpy
import sys
import types
from typing import Any


def open_data(path: str) -> dict[str, Any]:
    saferlhf: Any = types.SimpleNamespace(**runpy.run_path(path))
    if not sys.stderr.isatty():
        saferlhf.datasets.disable_progress_bars()
    source, revision = os.environ["SAFERLHF_DATASET"], os.environ.get("SAFERLHF_REVISION") or None
    splits = saferlhf.open_saferlhf(source, revision, None)
    for split in ("train", "test"):
        saferlhf.load_saferlhf(split, silent=True)  # raises for a column that is missing
    first = next(iter(splits.values()))
    folder = os.path.dirname(first.cache_files[0]["filename"])
    os.utime(folder)  # without a network `datasets` takes the newest folder of its cache
    return {
        "commit": saferlhf.saferlhf_commit(first),
        "folder": folder,
        "files": len(os.listdir(folder)),
        "bytes": sum(entry.stat().st_size for entry in os.scandir(folder)),
    }


def open_part(part: str, name: str, revision: str | None) -> None:
    """Of a model only the config: its weights are files, of which nothing is learned by loading them."""
    import transformers

    kind: Any = transformers.AutoConfig if part == "model" else transformers.AutoTokenizer
    kind.from_pretrained(name, revision=revision or "main")


def chain(error: BaseException) -> list[BaseException]:
    """The exception and those that it came from, the first to happen at the end."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) and cause not in found:
        found.append(cause)
    return found


def main() -> None:
    request = json.loads(sys.argv[1])
    answer: dict[str, Any] = {}
    for index, (part, name, revision) in enumerate(request["sources"]):
        try:
            if part == "data":
                answer = open_data(request["saferlhf"])
            else:
                open_part(part, name, revision)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            errors = chain(error)
            first = errors[0]
            while first.__cause__:
                first = first.__cause__
            answer["error"] = {
                "index": index,
                "kinds": [base.__name__ for each in errors for base in type(each).__mro__],
                "numbers": [each.errno for each in errors if isinstance(each, OSError) and each.errno],
                "said": str(first).strip() or type(first).__name__,
            }
            break
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
