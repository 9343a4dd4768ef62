"""The command line: `dualnn fit | validate | test | predict | compare | doctor | conformance | bench | zoo`."""

import os
import sys
from collections.abc import Sequence

from dualnn import __version__

EXIT_FAILED = 1
EXIT_USAGE = 2

_HELP = """\
usage: dualnn COMMAND [options]        (python -m dualnn COMMAND … is the same)

  fit        train          dualnn fit --config configs/base.yaml --config configs/signal/activity.yaml
  validate   evaluate on validation data
  test       evaluate on test data
  predict    run a trained model
  compare    train several arms of an experiment, side by side, and say which wins
             dualnn compare --config experiments/digits/compare.yaml --fast
  doctor     find where backprop fails in a training step, why, and what to use
             dualnn doctor --config configs/base.yaml --config configs/signal/auto.yaml
  conformance  check every derivative against PyTorch's own op and module databases
             dualnn conformance "nn.functional.*norm*"
  zoo        draw every activation, its curve and its derivative, into one picture
             dualnn zoo --out zoo.svg
  bench      time the library beside torch.func, backprop and JAX, in one process
             dualnn bench solvers/root

Options of a command: dualnn COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The words after `dualnn`; None takes them from the command line.

    Returns:
        0 if all went well, 1 if a run failed, 2 if what was asked for is not possible as it was written.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        dualnn ...
        0
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if args else EXIT_USAGE
    if args[0] == "--version":
        print(f"dualnn {__version__}")
        return 0
    from dualnn.training.dual_cli import DualCLI, named_error, quiet_lightning  # seconds, so not for --help
    from dualnn.training.errors import NonFiniteLossError

    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that YAML may name the classes of a module in the current folder
    quiet_lightning()
    try:
        if args[0] == "compare":
            from dualnn.training.compare import compare

            return compare(args[1:])
        if args[0] == "bench":
            from dualnn.bench.command import bench_command

            return bench_command(args[1:])
        if args[0] == "conformance":
            from dualnn.conformance.command import check

            return check(args[1:])
        if args[0] == "doctor":
            from dualnn.training.doctor_command import run_doctor

            return run_doctor(args[1:])
        if args[0] == "zoo":
            from dualnn.training.zoo_command import run_zoo

            return run_zoo(args[1:])
        DualCLI(args)
        return 0
    except SystemExit as exit:  # argument parsers leave this way, with --help too
        return exit.code if isinstance(exit.code, int) else EXIT_USAGE
    except Exception as error:
        ours = named_error(error)
        if ours is None:
            raise
        print(f"dualnn: error: {ours}", file=sys.stderr)
        return EXIT_FAILED if isinstance(ours, NonFiniteLossError) else EXIT_USAGE
