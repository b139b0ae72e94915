#!/usr/bin/env python3
"""What `ambersafe export` takes: time, and the memory of the process that reads the checkpoint (Linux).

    scripts/bench_export.py [--layers 10] [--repeat 3]

The checkpoint is a Llama of random weights, 45.5 MB a layer. Memory is the largest resident set, with the pages of the
mapped checkpoint, which the system takes back when it needs them; and of it what is not mapped. Of both, that of the
same process for a checkpoint without a layer is subtracted: imports, and all that does not grow with the model.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ambersafe_cli import checkpoints, demo, export

CHILDREN = Path(export.__file__).parent / "children"

MAKE = """
import sys, torch, transformers
folder, layers = sys.argv[1], int(sys.argv[2])
sizes = dict(vocab_size=1024, hidden_size=1024, intermediate_size=2389, num_attention_heads=8)
config = transformers.LlamaConfig(num_hidden_layers=layers, **sizes)
config.save_pretrained(folder)
state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
torch.save({"step_idx": 1, "state": state, "metrics": {}}, f"{folder}/policy.pt")
"""


def make(folder: Path, layers: int) -> int:
    """Make the folder of a model with a policy.pt, and return that file's size in bytes."""
    build = [sys.executable, str(CHILDREN / "tiny_model.py"), str(folder), str(demo.DATA / "train.jsonl")]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", MAKE, str(folder), str(layers)], check=True, capture_output=True)
    return (folder / "policy.pt").stat().st_size


def run(model: Path, dtype: str | None) -> tuple[float, int, int]:
    """Seconds, the largest resident set, and the largest part of it that is not mapped from a file, in bytes."""
    folder = model.with_name("out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    asked = {
        "checkpoint": str(model / "policy.pt"), "model": str(model), "revision": None, "tokenizer": str(model),
        "tokenizer_revision": None, "folder": str(folder), "dtype": dtype, "shard_bytes": export.SHARD_BYTES,
        "buffers": checkpoints.BUFFER.pattern,
    }  # fmt: skip
    begun = time.perf_counter()
    script = str(CHILDREN / "export_checkpoint.py")
    child = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    if child.stdin:
        child.stdin.write(json.dumps(asked).encode())
        child.stdin.close()
    peak = anonymous = 0
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        found = {key: int(kib) * 1024 for key, kib in re.findall(r"^(VmHWM|RssAnon):\s+(\d+)", status, re.MULTILINE)}
        peak, anonymous = max(peak, found.get("VmHWM", 0)), max(anonymous, found.get("RssAnon", 0))
        time.sleep(0.002)
    if child.wait() or not (folder / "config.json").is_file():
        raise SystemExit("the export failed")
    return time.perf_counter() - begun, peak, anonymous


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        nothing, model = Path(place) / "nothing", Path(place) / "model"
        make(nothing, 0)
        size = make(model, given.layers)
        print(f"a policy.pt of {size / 1e6:.0f} MB, float32")
        for dtype in (None, "bfloat16"):
            runs = [(run(nothing, dtype), run(model, dtype)) for _ in range(given.repeat)]
            seconds = [after[0] - before[0] for before, after in runs]
            peaks = [(after[1] - before[1]) / size for before, after in runs]
            anonymous = [(after[2] - before[2]) / size for before, after in runs]
            print(
                f"to {dtype or 'float32'}: {statistics.median(seconds):.1f} s, "
                f"{statistics.median(peaks):.2f} times its size resident (to {max(peaks):.2f}), "
                f"{statistics.median(anonymous):.2f} times not mapped (to {max(anonymous):.2f}); beyond "
                f"{statistics.median(before[1] for before, _ in runs) / 1e6:.0f} MB in "
                f"{statistics.median(before[0] for before, _ in runs):.1f} s for a checkpoint of no layers"
            )


if __name__ == "__main__":
    main()
