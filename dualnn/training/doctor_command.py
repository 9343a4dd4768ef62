"""`dualnn doctor`: examine the training step that a configuration describes, on its first batch."""

from collections.abc import Sequence

from dualnn.training.automatic import examine_step
from dualnn.training.dual_cli import DualCLI

EXIT_FINDINGS = 1


def run_doctor(argv: Sequence[str]) -> int:
    """Build model and data from a configuration, examine one training step, print the report.

    Args:
        argv: The words after `dualnn doctor`: `--config …` and overrides, as for `fit`.

    Returns:
        0 if backprop works everywhere, 1 if something fails.
    """
    cli = DualCLI(list(argv), run=False, save_config=False)
    data = cli.datamodule
    data.prepare_data()
    data.setup("fit")
    report = examine_step(cli.model, next(iter(data.train_dataloader())), 0)
    print(report)
    return 0 if report.ok else EXIT_FINDINGS
