"""Run one part in this process: `python -m gpu_check.part NAME --out FOLDER --clone FOLDER [--cpu]`; see main.py."""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

import torch

from gpu_check.figures import Report, Setup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clone", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    sys.path.insert(0, str(given.clone))  # upstream's modules import one another by their bare names
    torch.backends.cuda.matmul.allow_tf32 = True  # as train.py has it
    with tempfile.TemporaryDirectory(prefix=f"gpu-check-{given.name}-") as folder:
        os.chdir(folder)
        part = importlib.import_module(f"gpu_check.parts.{given.name}")
        part.run(Setup(not given.cpu, Path(folder), given.clone), Report(given.out / f"{given.name}.jsonl"))


if __name__ == "__main__":
    main()
