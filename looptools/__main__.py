"""The command line: ``python -m looptools demo`` and ``inspect``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from . import __version__

NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}  # the extra `demo`: module, package


def positive(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    Args:
        arguments: Words after ``python -m looptools``; None for those of this process.

    Returns:
        The exit status: 0 if all went well, 1 after an error or if a file is damaged, 2 if there is no such file, 130
        after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        "python -m looptools", description="Training loops for PyTorch as streams of states."
    )
    parser.add_argument("--version", action="version", version=f"looptools {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a small network on scanned digits: a tour in half a minute")
    demo.description = "Train a small network on scanned digits. Run it again in the same folder, and it goes on."
    demo.add_argument("--out", metavar="DIR", default="runs/digits", help="folder for results (default: %(default)s)")
    demo.add_argument("--epochs", metavar="N", type=positive, default=12, help="epochs in all (default: %(default)s)")
    inspect = commands.add_parser("inspect", help="show what a checkpoint holds, and whether it is sound")
    inspect.description = (
        "Show what a checkpoint, a folder of them or a file of weights holds, and whether it is sound."
    )
    inspect.epilog = (
        "Exit status: 0 if all is sound, 1 if something is damaged, 2 if there is no such file. "
        "Nothing is changed, and no code in a file runs."
    )
    inspect.add_argument("path", metavar="PATH", help="a .pt or .safetensors file, or a folder of checkpoints")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command == "inspect":
        return show(options.path)
    return run_demo(options.out, options.epochs)


def show(path: str) -> int:
    """Print what `looptools.verify` finds; the exit status."""
    from . import verify

    try:
        report = verify(path)
    except OSError as error:
        return failed("inspect", str(error).removeprefix("verify: "), status=2)
    encoding = sys.stdout.encoding or "utf-8"
    lines = repr(report).encode(encoding, "replace").decode(encoding)  # a key may have letters that the terminal lacks
    try:
        print(lines, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough; Python would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.sound else 1


def run_demo(out: str, epochs: int) -> int:
    """Train on digits; the exit status."""
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return failed("demo", f'{", ".join(missing)} not found. Install the extra: pip install "torch-looptools[demo]"')
    from .demo import command
    from .demo import demo as train

    try:
        train(out, epochs)
    except KeyboardInterrupt:
        again = command(out, epochs)
        print(f"\nStopped. This goes on from the last whole epoch:\n  {again}", file=sys.stderr)
        return 130
    except OSError as error:
        return failed("demo", f"cannot write to {out}: {error}. Give another folder: --out DIR")
    return 0


def failed(command: str, why: str, status: int = 1) -> int:
    """Say in one line what is wrong; the exit status."""
    print(f"python -m looptools {command}: error: {why}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
