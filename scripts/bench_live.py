#!/usr/bin/env python3
"""What the live view costs over `--plain`: wall time of the same training, and the launcher's own processor time.

    scripts/bench_live.py [--repeat 3] [--seconds 60] [--clone DIR]

Both run in turn in a terminal (a pty of 80 x 24 that is read all the time), each for about `--seconds`. Printed are the
medians, the spread of the ratio of pairs, in wall time and in the processor time of launcher and training together, and
the seconds of processor time that the launcher alone took for each second. The training uses every core, so that a
core's time is time taken from it.
"""

import argparse
import fcntl
import os
import pty
import shlex
import statistics
import struct
import subprocess
import tempfile
import termios
import threading
import time
from pathlib import Path

from bench_overhead import by_hand, prepare, sft, timed


def in_a_terminal(command: list[str], work: Path) -> tuple[float, float, float]:
    """Wall time of a command in a terminal, the processor time of its own process alone, and that of all its processes.

    In seconds.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    begun = time.perf_counter()
    environment = {**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    child = subprocess.Popen(command, cwd=work, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    reader = threading.Thread(target=_drain, args=(master,), daemon=True)
    reader.start()
    used = 0.0
    while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        time.sleep(0.05)
    seconds = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(ended[1])
    reader.join(timeout=5)
    os.close(master)
    if child.returncode:
        raise SystemExit(f"exit status {child.returncode}: {shlex.join(command)}")
    return seconds, used, ended[2].ru_utime + ended[2].ru_stime


def _drain(master: int) -> None:
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clone", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        clone = prepare(work, given.clone)
        short, _ = timed(by_hand(work, clone, 160, 0), work)
        longer, _ = timed(by_hand(work, clone, 3200, 1), work)
        examples = 16 * max(1, round((given.seconds - short) / (longer - short) * 3040 / 16))
        print(f"{examples} examples a run, two runs in turn, {given.repeat} times")
        wall: dict[str, list[float]] = {"plain": [], "live": []}
        processor: dict[str, list[float]] = {"plain": [], "live": []}
        shares: dict[str, list[float]] = {"plain": [], "live": []}
        for number in range(given.repeat):
            order = ("plain", "live") if number % 2 == 0 else ("live", "plain")
            for name in order:
                flags = ["--no-preflight", *(["--plain"] if name == "plain" else [])]
                seconds, used, of_all = in_a_terminal(sft(work, clone, examples, *flags), work)
                wall[name].append(seconds)
                processor[name].append(of_all)
                shares[name].append(used / seconds)
        for name in wall:
            share = statistics.median(shares[name])
            print(f"{name:6} {statistics.median(wall[name]):7.1f} s, launcher {share:.2%} of one core (medians)")
        for what, each in (("wall", wall), ("CPU", processor)):
            ratios = [b / a for a, b in zip(each["plain"], each["live"], strict=True)]
            print(f"{what:4} ratio {statistics.median(ratios):.4f} (median), {min(ratios):.4f} to {max(ratios):.4f}")


if __name__ == "__main__":
    main()
