#!/usr/bin/env python3
"""What processor time and memory reading a train.log takes: `scripts/bench_log.py [--lines 1000000] [--repeat 3]`.

Every line is one of a DPO step with all its metrics; the peak is that of the Python objects that reading makes.
"""

import argparse
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

from ambersafe_cli import metrics

LINE = (
    "train stats after {0} examples: {{'rewards_train/chosen': '0.0024515', 'rewards_train/rejected': '-0.0031', "
    "'rewards_train/accuracies': '0.5', 'rewards_train/margins': '0.0055', 'logps_train/rejected': '-150.2', "
    "'logps_train/chosen': '-140.55', 'loss/train': '0.69315', 'examples_per_second': '12.345', "
    "'grad_norm': '23.1', 'learning_rate': '5e-07', 'counters/examples': {0}, 'counters/updates': 1}}\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for lines in (given.lines // 10, given.lines):
            log = Path(folder) / "train.log"
            with log.open("w") as file:
                file.writelines(LINE.format(32 * number) for number in range(1, lines + 1))
            times = []
            for _ in range(given.repeat):
                begun = time.process_time()
                read = metrics.read_log(log)
                times.append(time.process_time() - begun)
            if not read.last_step or read.last_step.examples != 32 * lines:
                raise SystemExit("the last line was not read")
            tracemalloc.start()
            metrics.read_log(log)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            print(f"{lines:9,} lines: {statistics.median(times):6.2f} s of CPU (median), peak {peak / 1024:,.0f} kB")


if __name__ == "__main__":
    main()
