"""A picture of the zoo: a panel for every elementwise activation, its curve and its derivative."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualnn.activations.base import Activation
from dualnn.activations.registry import available, get, get_class
from dualnn.engine.errors import DualInputError, DualnnError
from dualnn.engine.transforms import jvp

FORMATS = (".svg", ".png", ".pdf")
#: Inputs that are drawn, from -RANGE to RANGE.
RANGE, POINTS = 5.0, 801
COLUMNS = 5


def curves(act: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, values and derivatives (of the primitive, for a hard decision) of an elementwise activation.

    Example:
        >>> x, y, slope = curves(get("swish_beta"))
        >>> bool((slope[400] - 0.5).abs() < 1e-12)  # at x = 0
        True
    """
    x = torch.linspace(-RANGE, RANGE, POINTS, dtype=torch.float64)
    with torch.no_grad():
        y, slope = jvp(act.double(), (x,), (torch.ones_like(x),))
    return x, y, slope


def members() -> list[str]:
    """The activations that have a curve: the elementwise ones.

    Example:
        >>> "kepler" in members(), "sparsemax" in members()
        (True, False)
    """
    return [name for name in available() if get_class(name).elementwise]


def draw_sheet(out: str | Path) -> list[str]:
    """Draw every member of the zoo with its default arguments into one picture.

    Args:
        out: The file; its ending, .svg, .png or .pdf, says how.

    Returns:
        The names that were drawn.

    Raises:
        DualInputError: another ending.
        DualnnError: matplotlib is not installed.
    """
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise DualInputError(f"a sheet is written as {', '.join(FORMATS)}, got {str(path)!r}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DualnnError("drawing needs matplotlib: pip install 'dualnn[dev]'") from error
    names = members()
    rows = -(-len(names) // COLUMNS)
    # Without a fixed salt and date every run would write another file.
    with rc_context({"font.size": 7, "svg.hashsalt": "dualnn", "axes.titlesize": 9}):
        figure = Figure(figsize=(2.3 * COLUMNS, 1.9 * rows))
        panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
        figure.subplots_adjust(0.03, 0.4 / (1.9 * rows), 0.99, 1 - 0.3 / (1.9 * rows), 0.2, 0.35)
        for name, panel in zip(names, panels, strict=False):
            _panel(panel, name)
        for panel in list(panels):
            panel.set_axis_off()
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower right", ncols=2, frameon=False)
        metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)
    return names


def _panel(panel: Any, name: str) -> None:
    act = get(name)
    x, y, slope = curves(act)
    surrogate = "primitive" in act.extra_repr()
    panel.axhline(0, color="0.85", linewidth=0.6)
    panel.axvline(0, color="0.85", linewidth=0.6)
    panel.plot(x, y, color="tab:blue", label="value", linewidth=1.4)
    panel.plot(x, slope, color="tab:red", label="derivative", linewidth=1, linestyle="--" if surrogate else "-")
    panel.set_title(name + (" (surrogate)" if surrogate else ""))
    low, high = panel.get_ylim()
    panel.set_ylim(max(low, -RANGE), min(high, RANGE))
