"""`python -m dualnn`: the command line, the same as the `dualnn` script."""

import sys

from dualnn.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
