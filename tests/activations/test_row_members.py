"""What sets each activation on rows apart: limits, extreme inputs, bad arguments."""

import pytest
import torch

import dualnn as dn
from dualnn import activations
from dualnn.activations.entmax import entmax
from dualnn.activations.permutahedron import pooled
from dualnn.engine.errors import DualInputError, DualShapeError, UnknownNameError

F64 = torch.float64


def rows(n: int = 50) -> torch.Tensor:
    return torch.randn(n, 7, dtype=F64) * torch.logspace(-2, 2, n, dtype=F64)[:, None]


@pytest.mark.parametrize("name", ["sparsemax", "entmax"])
def test_probabilities(name: str) -> None:
    y = activations.get(name).double()(rows())
    assert bool((y >= 0).all()) and bool((y == 0).any())
    torch.testing.assert_close(y.sum(-1), torch.ones(50, dtype=F64), rtol=1e-13, atol=0)


def test_entmax_lies_between_softmax_and_sparsemax() -> None:
    x = rows(20) / 10
    alpha = [torch.tensor(a, dtype=F64) for a in (1.001, 2.0)]
    torch.testing.assert_close(entmax(x, alpha[0]), torch.softmax(x, -1), rtol=0, atol=2e-2)
    torch.testing.assert_close(entmax(x, alpha[1]), activations.get("sparsemax")(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["sparsemax", "entmax"])
def test_masked_entries_get_nothing(name: str) -> None:
    x = torch.tensor([[0.3, -torch.inf, 0.1], [1.0, -torch.inf, -torch.inf]], dtype=F64, requires_grad=True)
    act = activations.get(name).double()
    y = act(x)
    (y * torch.arange(3)).sum().backward()
    assert y[:, 1].tolist() == [0, 0] and bool(x.grad.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in act.parameters())
    torch.testing.assert_close(y[0, ::2], act(x[0, ::2].detach()), rtol=1e-14, atol=0)
    assert act(torch.full((1, 2), -torch.inf, dtype=F64)).isnan().all()


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_projections_stay_in_the_ball_and_are_idempotent(norm: str) -> None:
    act = activations.get("ball", norm=norm, radius=1.3)
    x = rows()
    y = act(x)
    order = {"l1": 1, "l2": 2, "linf": torch.inf}[norm]
    assert bool((torch.linalg.vector_norm(y, order, dim=-1) <= 1.3 + 1e-13).all())
    torch.testing.assert_close(act(y), y, rtol=1e-12, atol=1e-13)
    zero = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    act(zero).sum().backward()
    assert bool((zero.grad == 1).all())


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_soft_topk_sums_to_k(temperature: float) -> None:
    x = rows()
    y = activations.get("soft_topk", k=3, temperature=temperature)(x)
    torch.testing.assert_close(y.sum(-1), torch.full((50,), 3.0, dtype=F64), rtol=1e-12, atol=0)
    assert bool(((y >= 0) & (y <= 1)).all())


def test_soft_topk_does_not_divide_by_zero_when_all_weights_are_settled() -> None:
    x = torch.tensor([1e4, 0.0, -1e4], dtype=F64, requires_grad=True)
    y = activations.get("soft_topk", temperature=0.1)(x)
    (y * torch.arange(3)).sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([1.0, 0.0, 0.0], dtype=F64), rtol=0, atol=1e-12)
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_soft_topk_of_an_infinite_entry_is_nan(value: float) -> None:
    x = torch.tensor([[1.0, value, 0.0], [1.0, 2.0, 0.0]], dtype=F64)
    assert activations.get("soft_topk")(x).isnan().all(-1).tolist() == [True, False]


def test_soft_sort_is_the_sort_up_to_a_strength_and_keeps_the_sum() -> None:
    x = torch.tensor([[1.0, 15.0, 0.0, 6.0]], dtype=F64)
    y = activations.get("soft_sort", strength=0.11)(x)  # the widest gap is 9
    torch.testing.assert_close(y, x.sort(-1, descending=True).values, rtol=0, atol=1e-14)
    x = rows()
    y = activations.get("soft_sort", strength=0.7)(x)
    torch.testing.assert_close(y.sum(-1), x.sum(-1), rtol=1e-12, atol=1e-12)
    assert bool((y.diff(dim=-1) <= 0).all())
    norms = torch.stack([torch.linalg.matrix_norm(dn.jacobian(activations.get("soft_sort"), row), 2) for row in x[:9]])
    assert bool((norms <= 1 + 1e-12).all())


def test_pool_adjacent_violators() -> None:
    s = torch.tensor([1.0, 3.0, 0.0, 0.5, -1.0], dtype=F64).numpy()
    assert pooled(s).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparsemax", {"total": 0.0}, "total must be positive"),
        ("entmax", {"alpha": 1.0}, "alpha must lie in"),
        ("ball", {"radius": -1.0}, "radius must be positive"),
        ("soft_topk", {"k": 0}, "k must be an integer >= 1"),
        ("hard_topk", {"temperature": 0.0}, "temperature must be positive"),
        ("soft_sort", {"strength": 0.0}, "strength must be positive"),
        ("rank", {"strength": -1.0}, "strength must be positive"),
    ],
)
def test_bad_starting_values(name: str, options: dict, message: str) -> None:
    with pytest.raises(DualInputError, match=message):
        activations.get(name, **options)


def test_unknown_norm() -> None:
    with pytest.raises(UnknownNameError, match="norm of ball"):
        activations.get("ball", norm="l3")


@pytest.mark.parametrize("name", ["soft_topk", "hard_topk"])
def test_k_below_the_length(name: str) -> None:
    with pytest.raises(DualShapeError, match="got k=4 and 4 entries"):
        activations.get(name, k=4)(torch.zeros(2, 4))
