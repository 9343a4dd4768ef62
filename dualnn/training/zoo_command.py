"""`dualnn zoo`: draw every elementwise activation, its curve and its derivative, into one picture."""

import argparse
from collections.abc import Sequence

from dualnn.activations.sheet import FORMATS, draw_sheet


def run_zoo(argv: Sequence[str]) -> int:
    """Draw the sheet.

    Args:
        argv: The words after `dualnn zoo`.

    Returns:
        0.

    Raises:
        DualInputError: A file ending that is no picture.
    """
    options = argparse.ArgumentParser(
        prog="dualnn zoo",
        description="Draw every elementwise activation, its curve and its derivative, into one picture.",
        allow_abbrev=False,
    )
    options.add_argument("--out", required=True, metavar="FILE", help=f"the picture ({', '.join(FORMATS)})")
    out = options.parse_args(argv).out
    names = draw_sheet(out)
    print(f"drew {len(names)} activations into {out}: {', '.join(names)}")
    return 0
