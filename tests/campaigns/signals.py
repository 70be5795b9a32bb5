"""Send SIGTERM and SIGUSR1 at random times, many times: no bit may be lost, and no process left behind.

python tests/campaigns/signals.py --n 2000
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from opcodes import everywhere, late
from signalled import Forker, often


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="signals for each number of workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opcodes", type=int, default=100, help="places within an iteration, in this process")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, late)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(None):
        print(f"at {options.opcodes} opcodes: {dict(everywhere(Path(folder), options.opcodes))}, no bit lost")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for workers in (0, 2):
        began = time.monotonic()
        with Forker() as forker, tempfile.TemporaryDirectory() as folder:
            counts = often(forker, Path(folder), workers=workers, signals=options.n, seed=options.seed)
        seconds = time.monotonic() - began
        print(
            f"workers {workers}: {counts['saved']} saved with exit code 75, {counts['late']} after the end, "
            f"{counts['finished']} trainings finished, no bit lost, no process left behind ({seconds:.0f} s)"
        )


if __name__ == "__main__":
    main()
