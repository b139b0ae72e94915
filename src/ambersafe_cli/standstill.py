"""A training whose processes are alive and do not get on: train.py says so in a line of its own."""

import re
from pathlib import Path

from ambersafe_cli import files, health

_SAID = re.compile(
    r"^(?:WARNING: |error: rank \d+ on .{1,255}? ends: )stuck for (\d{1,9}) seconds: (?:in )?(.{1,500})$"
)
MOVES = (
    "train stats after ", "skipping logging after ", "Running evaluation after ", "creating checkpoint to ",
    "building policy", "=== ambersafe: attempt ",
)  # fmt: skip
"""How lines of train.log begin behind which a standstill is over."""

_TAIL = 1 << 16
"""Bytes of the end of train.log that are looked at: a training that stands still prints nothing more."""


def parse_line(line: str) -> str | None:
    """What train.py says of a standstill, in one sentence; None for every other line."""
    match = _SAID.match(line.rstrip("\n"))
    return f"It has stood still for {match[1]} seconds: {match[2]}." if match else None


def of_run(folder: Path) -> str | None:
    """The same of a run, by the end of its train.log; None if it got on again."""
    try:
        with files.open_to_read(folder / "train.log") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if line.startswith(MOVES):
            return None
        if said := parse_line(line):
            return said
    return None


def advice(said: str) -> health.Advice:
    """What to say of a standstill."""
    return health.Advice("warning", "stuck", said, MEND)


MEND = (
    "Look at the disk, the GPUs (`nvidia-smi`) and the network of that machine. `ambersafe stop --now` ends the run "
    "without a checkpoint, and `ambersafe resume` goes on from the last one."
)
