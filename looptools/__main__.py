"""The command line: ``python -m looptools demo``."""

from __future__ import annotations

import argparse
import importlib.util
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
        The exit status: 0 if all went well, 1 after an error, 130 after Ctrl-C.
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
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return failed(f'{", ".join(missing)} not found. Install the extra: pip install "torch-looptools[demo]"')
    from .demo import command
    from .demo import demo as train

    try:
        train(options.out, options.epochs)
    except KeyboardInterrupt:
        again = command(options.out, options.epochs)
        print(f"\nStopped. This goes on from the last whole epoch:\n  {again}", file=sys.stderr)
        return 130
    except OSError as error:
        return failed(f"cannot write to {options.out}: {error}. Give another folder: --out DIR")
    return 0


def failed(why: str) -> int:
    """Say in one line what is wrong; the exit status."""
    print(f"python -m looptools demo: error: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
