import warnings

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.engine.errors import CompileFallbackWarning, DualInputError

F64 = torch.float64


def compiled(fn, **options):
    """Recorded, and run by torch's own eager backend: fast to build, the same program."""
    return dn.compile(fn, backend="eager", **options)


def dual(*shape, num=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return dn.dual(
        torch.randn(*shape, dtype=F64, generator=generator), torch.randn(num, *shape, dtype=F64, generator=generator)
    )


def same(a, b):
    torch.testing.assert_close(a.primal, b.primal)
    torch.testing.assert_close(a.tangent, b.tangent)
    assert a.level == b.level and a.num_tangents == b.num_tangents


def chain(y, x):
    for _ in range(5):
        y = torch.tanh(0.9 * y) + 0.1 * x
    return y


FUNCTIONS = {
    "chain": chain,
    "matrix": lambda a, b: torch.linalg.solve(a @ a.mT + torch.eye(4, dtype=F64), b),
    "softmax": lambda a, b: torch.softmax(a, -1) * b.sum(),
    "indexing": lambda a, b: torch.cat([a[:2], b[2:].flip(0)]) ** 2,
    "kinks": lambda a, b: torch.where(a > b, a.relu(), b.abs()),
    "in place": lambda a, b: a.clone().mul_(b).add_(1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("num", [0, 1, 3])
def test_equal_to_eager(name, num):
    fn = FUNCTIONS[name]
    a, b = dual(4, 4, num=num), dual(4, 4, num=num, seed=1)
    program = compiled(fn)
    same(program(a, b), fn(a, b))
    same(program(b, a), fn(b, a))
    same(program(a, a), fn(a, a))  # one tensor twice is two arguments
    same(program(a, b.primal), fn(a, b.primal))  # a constant beside a dual is another program
    assert program.programs == 2 and program.reason is None
    torch.testing.assert_close(program(a.primal, b.primal), fn(a.primal, b.primal))


@pytest.mark.slow
def test_inductor():
    a, b = dual(16), dual(16, seed=1)
    same(dn.compile(chain)(a, b), chain(a, b))


def test_structure_of_results():
    @compiled
    def parts(x, scale=1.0):
        return {"twice": 2 * x, "count": 3, "rest": (x.detach(), (x > 0).sum())}

    x = dual(4)
    out = parts(x, scale=2.0)
    same(out["twice"], 2 * x)
    assert out["count"] == 3
    torch.testing.assert_close(out["rest"][0], x.primal)
    assert int(out["rest"][1]) == int((x.primal > 0).sum())


def test_shapes_dtypes_and_constants_are_guarded():
    program = compiled(lambda x, power: x**power)
    for x, power in ((dual(3), 2), (dual(5), 2), (dual(3), 3), (dn.dual(torch.ones(3), torch.ones(3)), 2)):
        same(program(x, power), x**power)
    assert program.programs == 4
    transposed = dn.dual(torch.randn(4, 3, dtype=F64).T, torch.randn(2, 4, 3, dtype=F64).mT)
    same(program(transposed, 2), transposed**2)


class Sine(nn.Module):
    """The sine of a recurrent module's outputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0].sin()


class TestModules:
    def test_parameters_are_inputs(self):
        module = nn.Linear(3, 2).double()
        program, x = compiled(module), dual(4, 3)
        with torch.no_grad():
            same(program(x), module(x))
            module.weight.add_(1)
            same(program(x), module(x))
            module.weight = nn.Parameter(torch.randn(2, 3, dtype=F64))
            same(program(x), module(x))
        assert program.programs == 1

    @pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
    def test_a_recurrent_module_keeps_its_weights_in_two_places(self, kind):
        module = kind(3, 2).double()
        program, x = compiled(Sine(module)), dual(4, 1, 3)
        with torch.no_grad():
            same(program(x), module(x)[0].sin())
            module.weight_ih_l0.mul_(2)
            same(program(x), module(x)[0].sin())
            module.weight_hh_l0 = nn.Parameter(torch.randn_like(module.weight_hh_l0))
            same(program(x), module(x)[0].sin())
        assert program.programs == 1

    def test_buffers_are_updated_once_a_call(self):
        ours, theirs = (nn.BatchNorm1d(3).double() for _ in range(2))
        program, x = compiled(ours), dual(4, 3)
        with torch.no_grad():
            for calls in (1, 2):
                same(program(x), theirs(x))
                torch.testing.assert_close(ours.running_mean, theirs.running_mean)
                assert int(ours.num_batches_tracked) == calls
        assert not isinstance(ours.running_mean, dn.DualTensor)

    def test_train_and_eval_are_two_programs(self):
        module = nn.BatchNorm1d(3).double()
        program, x = compiled(module), dual(4, 3)
        with torch.no_grad():
            program(x)
            module.eval()
            same(program(x), module(x))


def test_a_backend_of_ones_own_and_a_loop_around_its_program():
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph

    step = dn.compile(lambda x, rate, name: (x + rate, x * rate), backend=backend)
    x, rate = torch.zeros(3), torch.ones(3)
    run, flat = step.prepared((x, rate, "constant"))
    for _ in range(4):
        flat[0], _ = run(*flat)
    torch.testing.assert_close(flat[0], torch.full((3,), 4.0))
    torch.testing.assert_close(step(x, rate, "constant"), (rate, x))
    assert graphs == [2] and step.programs == 1


def test_there_may_be_no_program_to_prepare():
    step = dn.compile(lambda x: x if float(x.sum()) > 0 else -x, backend="eager")
    with pytest.warns(CompileFallbackWarning, match="control flow"):
        assert step.prepared((torch.ones(2),)) is None


class TestFallbacks:
    def falls_back(self, fn, *args):
        program = compiled(fn)
        with pytest.warns(CompileFallbackWarning) as caught:
            out = program(*args)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            program(*args)  # said once
        assert program.reason is not None and program.reason in str(caught[0].message)
        return out, program.reason

    def test_control_flow_on_numbers(self):
        def fn(x):
            while x.sum() > 1:
                x = x / 2
            return x

        x = dual(3) + 5
        out, reason = self.falls_back(fn, x)
        assert "depends on numbers" in reason
        same(out, fn(x))

    def test_random_operations(self):
        _, reason = self.falls_back(lambda x: x * torch.rand_like(x.primal), dual(3))
        assert "random" in reason

    def test_autograd(self):
        x = torch.randn(3, dtype=F64, requires_grad=True)
        out, reason = self.falls_back(lambda x: x * x, x)
        assert "autograd" in reason and out.requires_grad

    def test_writes_to_an_argument(self):
        x = torch.ones(3)
        _, reason = self.falls_back(lambda x: x.add_(1), x)
        assert "in place" in reason and float(x[0]) == 3

    def test_nested_duals(self):
        def inner(x):
            return dn.jvp(lambda y: compiled(lambda u: u**3)(y), (x,), (torch.ones_like(x),))[1]

        x = torch.tensor(2.0, dtype=F64)
        with pytest.warns(CompileFallbackWarning, match="several levels"):
            torch.testing.assert_close(dn.jvp(inner, (x,), (torch.ones_like(x),))[1], 6 * x)

    def test_no_compiler(self, monkeypatch):
        from torch._inductor.exc import InvalidCxxCompiler

        def build(*args, **kwargs):
            raise InvalidCxxCompiler

        monkeypatch.setattr("torch._inductor.compile", build)
        x = dual(3)
        with pytest.warns(CompileFallbackWarning, match=r"C\+\+ compiler"):
            same(dn.compile(torch.tanh)(x), torch.tanh(x))

    def test_unhashable_argument(self):
        with pytest.raises(DualInputError, match="hashable"):
            compiled(lambda x, s: x)(dual(3), {1, 2})

    def test_too_many_programs_are_noticed(self):
        program = compiled(lambda x, s: x * s)
        with pytest.warns(UserWarning, match="pass numbers that vary as tensors"):
            for i in range(20):
                program(torch.ones(2), float(i))
