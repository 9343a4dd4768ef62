import xml.etree.ElementTree as ElementTree

import pytest
import torch

from dualnn import activations
from dualnn.activations.sheet import curves, draw_sheet, members
from dualnn.engine.errors import DualInputError
from dualnn.training.cli import main

pytest.importorskip("matplotlib")


def test_every_elementwise_member_is_drawn(tmp_path, capsys) -> None:
    expected = {n for n in activations.available() if activations.get_class(n).elementwise}
    out = tmp_path / "sheet.svg"
    assert main(["zoo", "--out", str(out)]) == 0
    assert set(members()) == expected
    assert f"drew {len(expected)} activations" in capsys.readouterr().out
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(out).getroot()
    panels = [g for g in root.iter(f"{svg}g") if g.get("id", "").startswith("axes_")]
    curves_of = [[g for g in panel.iter(f"{svg}g") if g.get("id", "").startswith("line2d_")] for panel in panels]
    assert len(panels) >= len(expected) and sum(len(lines) > 3 for lines in curves_of) == len(expected)


@pytest.mark.parametrize("name", members())
def test_curves_are_finite_and_the_derivative_is_the_derivative(name: str) -> None:
    act = activations.get(name)
    x, y, slope = curves(act)
    assert bool(y.isfinite().all()) and bool(slope.isfinite().all())
    leaf = x.clone().requires_grad_()
    (reverse,) = torch.autograd.grad(act.double()(leaf).sum(), leaf)
    torch.testing.assert_close(slope, reverse, rtol=1e-10, atol=1e-12)


def test_another_ending_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(DualInputError, match=r"\.svg, \.png, \.pdf, got 'sheet.bmp'"):
        draw_sheet("sheet.bmp")
    assert main(["zoo", "--out", str(tmp_path / "sheet.bmp")]) == 2
