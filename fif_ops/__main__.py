"""Command line: ``python -m fif_ops demo``, ``info`` and ``tune``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__

DEMO_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich", "PIL": "Pillow"}
FAILED, INTERRUPTED = 2, 130  # 1 means that the two networks disagree


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type for whole numbers from ``smallest`` on."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {smallest}")
        return value

    return convert


def positive(text: str) -> float:
    """An argparse type for finite numbers above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m fif_ops", description="Feature augment (FiF) units for PyTorch, fused into one pass."
    )
    parser.add_argument("--version", action="version", version=f"fif_ops {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    from . import tune

    tune.add_arguments(
        commands.add_parser(
            "tune",
            help="measure the Triton kernels and the backends on this machine's GPU and keep the best",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    info = commands.add_parser("info", help="show versions, the library, the instruction set and the backends")
    info.add_argument("--json", action="store_true", dest="as_json", help="print the same as JSON")
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="train HWNet twice on real images, fused and reference, and compare",
        description="Trains HWNet on real images twice from the same weights, with the fused unit and with the "
        "reference, then compares results, speed and memory. Exit status: 0 the two agree, 1 they disagree, "
        "2 the demo could not run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo.add_argument
    add(
        "--data",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="folder of class folders of images, or of train/ and test/ with class folders in each "
        "(default: scikit-learn's 1,797 scanned digits)",
    )
    add("--size", type=at_least(16), default=32, help="side of the images in pixels")
    add(
        "--limit",
        type=at_least(2),
        metavar="N",
        default=argparse.SUPPRESS,
        help="use at most N images of each class folder (default: all)",
    )
    add("--width", type=positive, default=0.5, help="width multiplier of HWNet")
    add("--epochs", type=at_least(1), default=7, help="passes over the training images")
    add("--batch-size", type=at_least(2), default=64, help="images per training step")
    add("--lr", type=positive, default=0.05, dest="learning_rate", help="learning rate of the first step")
    add("--seed", type=at_least(0), default=0, help="seed of weights, order and crops")
    add("--rounds", type=at_least(1), default=25, help="rounds of each time measurement")
    add("--threads", type=at_least(1), default=argparse.SUPPRESS, help="threads for torch (default: torch's choice)")
    add("--channels-last", action="store_true", default=False, help="run both networks in channels_last")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 runs both under autocast")
    add("--out", type=Path, metavar="DIR", default=Path("out"), help="where demo.png and demo.json go")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = build_parser()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    if command is None:
        parser.print_help()
        return 0
    try:
        if command == "info":
            from . import info

            return info.run(**options)
        if command == "tune":
            from . import tune

            return tune.run(tune.Settings(**options))
        from . import demo

        return demo.run(demo.Settings(**options))
    except ModuleNotFoundError as error:
        missing = DEMO_PACKAGES.get((error.name or "").partition(".")[0])
        if missing is None:
            raise
        print(f"{missing} is missing, which the demo needs: pip install 'fif_ops[demo]'", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
