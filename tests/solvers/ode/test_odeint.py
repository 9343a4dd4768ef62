import math

import pytest
import torch

import dualnn as dn
from dualnn.engine.errors import (
    ConvergenceError,
    DualInputError,
    StructureError,
    TangentLostError,
    UnknownNameError,
)
from dualnn.solvers import odeint
from dualnn.solvers.ode.stats import Status
from tests.solvers.ode.problems import (
    DRIVEN,
    F64,
    KNOWN,
    LAST,
    LATE,
    MATRIX,
    METHODS,
    ROBERTSON,
    START,
    STIFF,
    SUNDIALS,
    driven,
    linear,
    robertson,
    van_der_pol,
)

methods = pytest.mark.parametrize("method", METHODS)
stiff = pytest.mark.parametrize("method", STIFF)
TIGHT = {"radau": 1e-9, "rodas5p": 1e-9, "bdf": 1e-10, "dopri5": 1e-10, "dop853": 1e-10}


def times(*t):
    return torch.tensor(t, dtype=F64)


class TestPublishedProblems:
    @pytest.mark.slow
    @stiff
    @pytest.mark.parametrize("name", KNOWN)
    def test_states_and_all_sensitivities_to_six_digits(self, name, method):
        known, rtol = KNOWN[name], 1e-8 if method != "bdf" else 1e-9
        options = {"sensitivities": True}
        y, dy = dn.jvp(
            lambda p: odeint(known.fn, known.y0, known.t, (p,), method, rtol, rtol * 1e-4, options),
            (known.p,),
            (torch.eye(len(known.p), dtype=F64),),
        )
        torch.testing.assert_close(y[1:], known.y, rtol=1e-6, atol=0)
        torch.testing.assert_close(dy[:, 1:].transpose(0, 1), known.dy, rtol=1e-6, atol=0)
        if name == "robertson":
            torch.testing.assert_close(y.sum(-1), torch.ones(3, dtype=F64), rtol=0, atol=1e-13)
            assert float((dy.sum(-1).abs() / dy.abs().amax(-1).clamp_min(1e-300)).max()) < 1e-9

    @stiff
    def test_states_and_all_sensitivities(self, method):
        """The same to four digits, with the tangents outside the error test."""
        known = ROBERTSON
        y, dy = dn.jvp(
            lambda p: odeint(known.fn, known.y0, known.t, (p,), method, 1e-6, 1e-10),
            (known.p,),
            (torch.eye(3).to(F64),),
        )
        torch.testing.assert_close(y[1:], known.y, rtol=1e-5, atol=0)
        torch.testing.assert_close(dy[:, 1:].transpose(0, 1), known.dy, rtol=2e-4, atol=0)

    @pytest.mark.slow
    @stiff
    def test_robertson_late(self, method):
        t, y_late, by_first = LATE
        y, dy = dn.jvp(
            lambda p: odeint(robertson, ROBERTSON.y0, times(0, t), (p,), method, rtol=1e-8, atol=1e-13)[-1],
            (ROBERTSON.p,),
            (torch.eye(3, dtype=F64)[:1],),
        )
        torch.testing.assert_close(y, y_late, rtol=1e-6, atol=0)
        torch.testing.assert_close(dy[0], by_first, rtol=3e-6, atol=0)

    @pytest.mark.slow
    @stiff
    def test_robertson_to_the_last(self, method):
        """Steps grow with t over eleven decades, and none collapses; six digits at the end, sensitivities too."""
        end, y_end, powers = LAST

        def solve(p):
            t = times(0, *(t for t, *_ in SUNDIALS), end)
            y, stats = odeint(robertson, ROBERTSON.y0, t, (p,), method, 1e-8, 1e-14, full_output=True)
            assert float(stats.step_size) > 1e-3 * end and int(stats.steps) < 2000
            return y

        y, dy = dn.jvp(solve, (ROBERTSON.p,), (torch.eye(3, dtype=F64),))
        torch.testing.assert_close(y[-1], y_end, rtol=2e-6, atol=0)
        torch.testing.assert_close(dy[:, -1, 0], powers * y[-1, 0] / ROBERTSON.p, rtol=1e-5, atol=0)
        printed = torch.tensor(SUNDIALS, dtype=F64)
        torch.testing.assert_close(y[1:-1, 0], printed[:, 1], rtol=5e-4, atol=0)
        torch.testing.assert_close(dy[0, 1:-1, 0], printed[:, 2], rtol=1e-3, atol=0)

    @pytest.mark.slow
    @stiff
    def test_very_stiff_van_der_pol(self, method):
        # The reference of the "Test Set for IVP Solvers" (problem vdpol), which scipy's Radau at 1e-11 confirms.
        reference = times(1.706167732170483, -0.8928097010247975)
        y = odeint(van_der_pol, times(2, 0), times(0, 2), (times(1e-6),), method, rtol=1e-7, atol=1e-7)[-1]
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=0)

    @methods
    def test_an_error_of_the_size_of_the_tolerance(self, method):
        exact = torch.linalg.matrix_exp(MATRIX) @ START
        for rtol in (1e-4, 1e-6, 1e-8):
            y = odeint(linear, START, times(0, 1), (MATRIX,), method, rtol=rtol, atol=rtol)[-1]
            assert float((y - exact).abs().max()) < 10 * rtol


class TestLinear:
    @methods
    @pytest.mark.parametrize("end", [1.0, -0.3])
    def test_values_and_all_derivatives_in_closed_form(self, method, end):
        """d expm(A t) y0 in A, y0, t0 and t, both directions of time."""
        t, rtol = times(0.2, 0.2 + end / 3, 0.2 + end), TIGHT[method]
        generator = torch.Generator().manual_seed(0)
        tangents = tuple(torch.randn(2, *x.shape, dtype=F64, generator=generator) for x in (START, t, MATRIX))

        def exact(y0, t, matrix):
            return torch.stack([dn.solvers.expm(matrix * (s - t[0])) @ y0 for s in t])

        def ours(y0, t, matrix):
            return odeint(linear, y0, t, (matrix,), method, rtol=rtol, atol=rtol)

        for got, wanted in zip(
            dn.jvp(ours, (START, t, MATRIX), tangents), dn.jvp(exact, (START, t, MATRIX), tangents), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6 * float(wanted.abs().max()))

    @methods
    def test_between_the_steps(self, method):
        """Many requested times cost no more steps where the method interpolates, and are as good."""
        t = torch.linspace(0, 1, 101, dtype=F64)
        options = {"land": False}
        y, stats = odeint(linear, START, t, (MATRIX,), method, rtol=1e-6, atol=1e-6, full_output=True, options=options)
        _, end = odeint(linear, START, t[[0, -1]], (MATRIX,), method, rtol=1e-6, atol=1e-6, full_output=True)
        exact = torch.stack([torch.linalg.matrix_exp(MATRIX * s) @ START for s in t])
        assert int(stats.steps) == int(end.steps)
        assert float((y - exact).abs().max()) < (1e-3 if method == "radau" else 3e-5)
        landed = odeint(linear, START, t, (MATRIX,), method, rtol=1e-6, atol=1e-6, options={"land": True})
        assert float((landed - exact).abs().max()) < 1e-5

    @methods
    def test_float32(self, method):
        y = odeint(linear, START.float(), times(0, 1).float(), (MATRIX.float(),), method, rtol=1e-5, atol=1e-6)
        assert y.dtype == torch.float32
        exact = torch.linalg.matrix_exp(MATRIX) @ START
        torch.testing.assert_close(y[-1].double(), exact, rtol=0, atol=1e-4)

    @methods
    def test_there_and_back(self, method):
        y0, _, p = DRIVEN
        rtol = TIGHT[method]
        end = odeint(driven, y0, times(0, 0.3), (p,), method, rtol=rtol, atol=rtol)[-1]
        back = odeint(driven, end, times(0.3, 0), (p,), method, rtol=rtol, atol=rtol)[-1]
        torch.testing.assert_close(back, y0, rtol=1e-5, atol=1e-5)


class TestBatches:
    @methods
    def test_a_sample_in_a_batch_goes_as_it_goes_alone(self, method):
        """Steps of its own: a hard neighbour changes nothing, not even the number of steps."""
        y0, t, p = DRIVEN
        hard = torch.stack([p, p * 20, p * 0.1])
        start = torch.stack([y0, y0 * 3, -y0])
        tangent = torch.ones_like(hard)[None]
        rtol = 1e-5

        def solve(y0, p):
            found, stats = odeint(driven, y0, t, (p,), method, rtol=rtol, atol=1e-7, full_output=True)
            counts.append(stats)
            return found

        counts = []
        y, dy = dn.jvp(lambda p: solve(start, p), (hard,), (tangent,))
        assert y.shape == (3, 3, 2)
        assert len(set(counts[0].steps.tolist())) > 1
        for b in range(3):
            one, done = dn.jvp(lambda p, b=b: solve(start[b], p), (hard[b],), (tangent[:, b],))
            torch.testing.assert_close(y[:, b], one, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(dy[:, :, b], done, rtol=1e-8, atol=1e-8)
            assert int(counts[0].steps[b]) == int(counts[-1].steps)

    @methods
    def test_the_other_samples_results_can_be_had(self, method):
        def grow(t, y, c):
            return c * y * y  # ends at t = 1 / (c y0)

        c, y0 = torch.tensor([[0.1], [2.0], [0.2]], dtype=F64), torch.ones(3, 1, dtype=F64)
        options = {"max_steps": 2000}
        with pytest.raises(ConvergenceError, match=r"1 of 3 samples \(first: \[1\]\).*at t = 0\.(5|4999)"):
            odeint(grow, y0, times(0, 1), (c,), method, options=options)
        y, stats = odeint(grow, y0, times(0, 0.2, 1), (c,), method, options=options, on_failure="nan", full_output=True)
        assert stats.done.tolist() == [True, False, True]
        exact = 1 / (1 - c.squeeze(-1) * times(0, 0.2, 1)[:, None])
        torch.testing.assert_close(y[:2, :, 0], exact[:2], rtol=1e-4, atol=0)
        torch.testing.assert_close(y[2, [0, 2], 0], exact[2, [0, 2]], rtol=1e-4, atol=0)
        assert bool(y[2, 1].isnan().all())

    def test_samples_that_mix_are_refused(self):
        with pytest.raises(StructureError, match="mix samples"):
            odeint(lambda t, y: -y.mean(0, keepdim=True).expand_as(y), torch.ones(3, 1, dtype=F64), times(0, 1))

    @methods
    def test_time_has_the_documented_shape(self, method):
        seen = set()

        def fn(t, y):
            seen.add(tuple(t.shape))
            return -y * t

        odeint(fn, torch.ones(2, dtype=F64), times(0, 1), method=method)
        assert seen == {()}
        seen.clear()
        odeint(fn, torch.ones(3, 2, dtype=F64), times(0, 1), method=method)
        assert seen == {(3, 1)}


class TestCourse:
    @methods
    def test_statistics(self, method):
        y0, t, p = DRIVEN
        _, stats = odeint(driven, y0, t, (p,), method, full_output=True)
        assert int(stats.status) == Status.DONE and float(stats.time) == 1.0
        assert int(stats.steps) > 3 and stats.evaluations > int(stats.steps)
        assert (stats.jacobians > 0) == (stats.factorisations > 0) == (method in STIFF)
        assert (int(stats.newton_iterations) > 0) == (method in ("radau", "bdf"))

    @stiff
    def test_few_rejections_and_iterations(self, method):
        """A wrong sign in the iteration matrix leaves the values right, and shows here."""
        _, stats = odeint(robertson, ROBERTSON.y0, ROBERTSON.t, (ROBERTSON.p,), method, 1e-6, 1e-10, full_output=True)
        assert int(stats.rejected) <= 0.15 * int(stats.steps)
        assert int(stats.newton_failures) <= 2
        assert int(stats.newton_iterations) <= 3.5 * int(stats.steps)
        assert int(stats.steps) < 350

    @methods
    def test_a_single_time_is_the_start(self, method):
        torch.testing.assert_close(odeint(linear, START, times(0.5), (MATRIX,), method), START[None], rtol=0, atol=0)

    def test_components_have_tolerances_of_their_own(self):
        def apart(t, y):
            return torch.stack([torch.cos(10 * t), torch.cos(t)], -1)

        y0 = torch.zeros(2, dtype=F64)
        counts = [
            int(
                odeint(
                    apart,
                    y0,
                    times(0, 5),
                    method="dopri5",
                    atol=atol,
                    rtol=1e-9,
                    full_output=True,
                    options={"norm": "max"},
                )[1].steps
            )
            for atol in (torch.tensor([1e-9, 1.0], dtype=F64), torch.tensor([1.0, 1e-9], dtype=F64))
        ]
        assert counts[0] > 2 * counts[1]


class TestErrors:
    def test_a_misspelt_name(self):
        for call in (
            lambda: odeint(linear, START, times(0, 1), (MATRIX,), "radua"),
            lambda: odeint(linear, START, times(0, 1), (MATRIX,), options={"max_stesp": 1}),
            lambda: odeint(linear, START, times(0, 1), (MATRIX,), on_failure="nana"),
            lambda: odeint(linear, START, times(0, 1), (MATRIX,), options={"norm": "rsm"}),
        ):
            with pytest.raises(UnknownNameError, match="did you mean"):
                call()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"t": times(0, 1, 1)}, r"t\[1\] = 1 is followed by 1"),
            ({"t": times(0, 2, 1)}, r"t\[1\] = 2 is followed by 1"),
            ({"t": times(0, math.nan)}, "nan"),
            ({"t": times(0, 1).float()}, "float32"),
            ({"t": times(0, 1)[None]}, r"\(T,\)"),
            ({"t": 1.0}, "torch.Tensor"),
            ({"y0": START.half()}, "float16"),
            ({"y0": START * math.inf}, "infinite"),
            ({"y0": START[None, None]}, r"\(B, n\)"),
            ({"y0": START[0]}, r"\(n,\)"),
            ({"args": MATRIX}, "tuple"),
            ({"rtol": 1e-17}, "below what torch.float64 can give"),
            ({"rtol": -1.0}, "rtol must be > 0"),
            ({"atol": 0.0}, "passes through 0"),
            ({"atol": torch.ones(2)}, r"\(3,\)"),
            ({"options": {"first_step": -1.0}}, "direction"),
            ({"options": {"max_order": 6}}, "1 to 5"),
        ],
    )
    def test_bad_arguments(self, change, words):
        given = {"y0": START, "t": times(0, 1), "args": (MATRIX,), **change}
        with pytest.raises(DualInputError, match=words):
            odeint(linear, **given)

    @methods
    def test_results_of_the_wrong_kind(self, method):
        with pytest.raises(StructureError, match="shape"):
            odeint(lambda t, y: y[..., :1], START, times(0, 1), method=method)
        with pytest.raises(StructureError, match="float32"):
            odeint(lambda t, y: y.float(), START, times(0, 1), method=method)

    @methods
    def test_nan_from_the_start_and_on_the_way(self, method):
        with pytest.raises(ConvergenceError, match="nan or infinite.*at t = 0 after 0 steps"):
            odeint(lambda t, y: torch.log(-y), torch.ones(1, dtype=F64), times(0, 1), method=method)
        with pytest.raises(ConvergenceError, match=r"(nan or infinite|too short|matrix).*at t = (1|0\.99)"):
            odeint(lambda t, y: -torch.sqrt(y), torch.full((1,), 0.25, dtype=F64), times(0, 2), method=method)

    @methods
    def test_too_many_steps(self, method):
        with pytest.raises(ConvergenceError, match=r"took max_steps steps.*raise max_steps"):
            odeint(robertson, ROBERTSON.y0, times(0, 40), (ROBERTSON.p,), method, options={"max_steps": 5})

    @methods
    def test_a_solution_that_blows_up(self, method):
        """1 / (1 - t): steps shrink to what times resolve, and the message says where."""
        with pytest.raises(ConvergenceError, match=r"too short for the dtype: at t = (1|0\.9999).*may blow up"):
            odeint(lambda t, y: y * y, times(1), times(0, 2), method=method, options={"max_steps": 3000})

    @stiff
    def test_a_derivative_that_is_infinite(self, method):
        """Never a wrong result in silence: LU of an infinite matrix can look like that of a regular one."""

        def fn(t, y):  # its slope is finite at 0, the derivative of it is not
            a, b = y.unbind(-1)
            return torch.stack([torch.sqrt(a) + b, -b], -1)

        if method == "bdf":  # looks again at the end of its step, where it is finite
            y = odeint(fn, times(0, 1), times(0, 1), method=method, rtol=1e-8)[-1]
            exact = odeint(fn, times(0, 1), times(0, 1), method="dopri5", rtol=1e-8)[-1]
            torch.testing.assert_close(y, exact, rtol=1e-5, atol=0)
            return
        with pytest.raises(ConvergenceError, match="iteration matrix"):
            odeint(fn, times(0, 1), times(0, 1), method=method)

    def test_what_was_captured_is_not_lost_in_silence(self):
        p = torch.ones(1, dtype=F64, requires_grad=True)
        with pytest.raises(TangentLostError, match="requires grad"):
            odeint(lambda t, y: -p * y, torch.ones(1, dtype=F64), times(0, 1))
        with pytest.raises(TangentLostError, match="carries tangents"):
            dn.jvp(
                lambda q: odeint(lambda t, y: -q * y, torch.ones(1, dtype=F64), times(0, 1)),
                (p.detach(),),
                (torch.ones(1, dtype=F64),),
            )
