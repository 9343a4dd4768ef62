"""Linear algebra on duals: identities of the factors' derivatives, gauge, degeneracy, named errors."""

import pytest
import torch

import dualnn as dn
from dualnn import solvers as S
from dualnn.engine.errors import DegenerateWarning, DualInputError, DualShapeError, SingularMatrixError
from dualnn.engine.factored import Factored
from tests.engine.oracles import five_point

L = torch.linalg
REAL, COMPLEX = torch.float64, torch.complex128
DTYPES = pytest.mark.parametrize("dtype", [REAL, COMPLEX])


def draw(*shape, dtype=REAL, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def regular(*shape, dtype=REAL):
    return draw(*shape, dtype=dtype) + torch.diag_embed(torch.arange(3.0, 3.0 + shape[-1])).to(dtype)


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def push(op, A, num=3):
    """Values and tangents of an op in ``num`` random directions."""
    t = draw(num, *A.shape, dtype=A.dtype, seed=7)
    out = op(dn.dual(A, t))
    return t, [(x.primal, x.tangent) for x in (out if isinstance(out, tuple) else (out,))]


@DTYPES
@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4), (2, 5, 3), (3, 5)])
@pytest.mark.parametrize("num", [1, 3, 20])
def test_lu(shape, dtype, num):
    t, ((p, dp), (low, dl), (up, du)) = push(S.lu, draw(*shape, dtype=dtype), num)
    close(p @ (dl @ up + low @ du), t)
    assert not dp.any() and not dl.triu().any() and not du.tril(-1).any()


@DTYPES
@pytest.mark.parametrize("mode", ["reduced", "complete"])
@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 3), (2, 3, 5)])
def test_qr(shape, mode, dtype):
    A = draw(*shape, dtype=dtype)
    t, ((q, dq), (r, dr)) = push(lambda A: S.qr(A, mode), A)
    close(dq @ r + q @ dr, t)
    close(dq.mH @ q + q.mH @ dq, torch.zeros(3, *q.mH.shape[:-1], q.shape[-1], dtype=dtype))
    assert not dr.tril(-1).abs().max() > 1e-14
    assert torch.imag(dr.diagonal(0, -2, -1) + 0j).abs().max() < 1e-14
    _, ((none, _), (r_only, dr_only)) = push(lambda A: S.qr(A, "r"), A)
    k = min(shape[-2:])
    assert none.numel() == 0 and torch.equal(r_only, L.qr(A, "r")[1])
    close(dr_only, dr[..., :k, :])


@DTYPES
def test_the_columns_of_a_complete_q_move_as_the_program_moves_them(dtype):
    A, t = draw(2, 5, 3, dtype=dtype), draw(1, 2, 5, 3, dtype=dtype, seed=5)
    q, _ = S.qr(dn.dual(A, t), "complete")
    close(q.tangent[0], five_point(lambda h: [L.qr(A + h * t[0], "complete")[0]])[0], 1e-8)


def test_where_a_reflector_jumps_the_completed_columns_say_so():
    A = torch.stack([torch.tensor([[2.0, 1.0], [0.0, 3.0], [0.0, 0.0]], dtype=REAL), draw(3, 2)])
    with pytest.warns(DegenerateWarning, match="reflector jumps"):
        q, r = S.qr(dn.dual(A, draw(2, 3, 2, seed=1)), "complete")
    lost = q.tangent.isnan()
    assert lost[0, 0, :, 2].all() and lost.sum() == 3 and r.tangent.isfinite().all()


def test_qr_of_two_by_two():
    A = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=REAL)
    _, r = S.qr(dn.dual(A, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=REAL)))
    close(r.tangent[0, 0, 0].abs(), torch.tensor(10.0, dtype=REAL) ** -0.5, 1e-15)


def hermitian(*shape, dtype, seed=0):
    A = draw(*shape, dtype=dtype, seed=seed)
    return A + A.mH


@DTYPES
@pytest.mark.parametrize("upper", [False, True])
def test_cholesky(dtype, upper):
    A = hermitian(2, 4, 4, dtype=dtype) + 12 * torch.eye(4, dtype=dtype)
    t = hermitian(3, 2, 4, 4, dtype=dtype, seed=3)
    f = S.cholesky(dn.dual(A, t), upper=upper)
    low, d = (f.primal.mH, f.tangent.mH) if upper else (f.primal, f.tangent)
    close(d @ low.mH + low @ d.mH, t)
    assert not d.triu(1).any()


@DTYPES
@pytest.mark.parametrize("UPLO", ["L", "U"])
def test_eigh(dtype, UPLO):
    A, t = hermitian(2, 4, 4, dtype=dtype), hermitian(3, 2, 4, 4, dtype=dtype, seed=3)
    values, vectors = S.eigh(dn.dual(A, t), UPLO)
    v, dv, e, de = vectors.primal, vectors.tangent, values.primal, values.tangent
    close(A @ dv + t @ v, dv * e.unsqueeze(-2) + v * de.unsqueeze(-2), 1e-11)
    assert (v.mH @ dv).diagonal(0, -2, -1).abs().max() < 1e-12
    close(L.eigvalsh(dn.dual(A, t), UPLO).tangent, de)


def test_second_derivative_of_an_eigenvalue():
    A, t = hermitian(4, 4, dtype=REAL), hermitian(4, 4, dtype=REAL, seed=3)
    e, v = L.eigh(A)
    _, second = dn.jvp(lambda A: dn.jvp(lambda A: S.eigh(A)[0], (A,), (t,))[1], (A,), (t,))
    p = v.mT @ t @ v
    gaps = e.unsqueeze(1) - e + torch.eye(4, dtype=REAL)
    close(second, 2 * (p**2 * (1 - torch.eye(4, dtype=REAL)) / gaps).sum(1), 1e-10)


@DTYPES
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(4, 4), (2, 5, 3), (2, 3, 5)])
def test_svd(shape, full, dtype):
    A = draw(*shape, dtype=dtype)
    t, ((u, du), (s, ds), (vh, dvh)) = push(lambda A: S.svd(A, full), A)
    k = s.shape[-1]
    cut = (u[..., :k] * s.unsqueeze(-2)), (du[..., :k] * s.unsqueeze(-2) + u[..., :k] * ds.unsqueeze(-2))
    close(cut[1] @ vh[..., :k, :] + cut[0] @ dvh[..., :k, :], t, 1e-11)
    for q, dq in ((u, du), (vh.mH, dvh.mH)):
        assert (dq.mH @ q + q.mH @ dq).abs().max() < 1e-11
    close(L.svdvals(dn.dual(A, t)).tangent, ds)


@DTYPES
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("batch", [(), (2,), (20,)])
@pytest.mark.parametrize("num", [0, 1, 9])
def test_solve(batch, left, num, dtype):
    A, X = regular(*batch, 3, 3, dtype=dtype), draw(*batch, 3, 3, dtype=dtype)
    B = A @ X if left else X @ A
    ta, tb = draw(num, *A.shape, dtype=dtype, seed=1), draw(num, *B.shape, dtype=dtype, seed=2)
    x = S.solve(dn.dual(A, ta), dn.dual(B, tb), left=left)
    assert torch.equal(x.primal, L.solve(A, B, left=left))
    close(A @ x.tangent + ta @ x.primal if left else x.tangent @ A + x.primal @ ta, tb)


@DTYPES
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
def test_one_factorisation_serves_every_level(dtype, adjoint, contiguous, monkeypatch):
    A = regular(2, 3, 3, dtype=dtype)
    A = A if contiguous else A.mT.contiguous().mT
    t, b = draw(2, 3, 3, dtype=dtype, seed=1), draw(2, 3, 1, dtype=dtype)
    nested = dn.dual(dn.dual(A, t.unsqueeze(0)), dn.dual(t, t.unsqueeze(0)).unsqueeze(0))
    count = []
    kept = L.lu_factor_ex
    monkeypatch.setattr(L, "lu_factor_ex", lambda *a: count.append(1) or kept(*a))
    factored = Factored(nested)
    x = (factored.solve_adjoint if adjoint else factored.solve)(b)
    again = (factored.solve_adjoint if adjoint else factored.solve)(b)
    assert len(count) == 1 and torch.equal(again.primal.primal, x.primal.primal)
    M, dM = (A.mH, t.mH) if adjoint else (A, t)
    first = -L.solve(M, dM @ x.primal.primal)
    close(x.primal.tangent[0], first)
    # A(s, r) = A + (s + r) t + s r t: d2X = -A^-1 (dA2 X + 2 dA dX)
    close(x.tangent.tangent[0, 0], -L.solve(M, dM @ x.primal.primal + 2 * dM @ first))


def test_factors_of_a_recorded_matrix_are_differentiated():
    A, b = regular(2, 3, 3).requires_grad_(), draw(2, 3, 2).requires_grad_()
    factored = Factored(A)
    assert torch.autograd.gradcheck(lambda A, b: Factored(A).solve(b), (A, b))
    assert torch.autograd.gradgradcheck(lambda A, b: Factored(A).solve_transposed(b), (A, b))
    close(A @ factored.solve(b), b)
    close(A.mT @ factored.solve_transposed(b), b)


def test_an_inverse_and_a_product_are_as_accurate_as_substitution():
    hilbert = 1 / (torch.arange(6.0, dtype=REAL).unsqueeze(1) + torch.arange(6.0, dtype=REAL) + 1)
    A, X = hilbert.expand(10, 6, 6).contiguous(), draw(10, 6, 40)
    factored = Factored(A)
    error = (factored.solve(A @ X) - X).abs().max()
    assert factored._inverse is not None  # many columns: the path under test
    assert error < 10 * (L.solve(A, A @ X) - X).abs().max()


@DTYPES
def test_cholesky_solve_where_torch_is_wrong(dtype):
    low, b = regular(2, 3, 3, dtype=dtype).tril(), draw(2, 3, 2, dtype=dtype)
    tl, tb = draw(2, 3, 3, dtype=dtype, seed=1), draw(2, 3, 2, dtype=dtype, seed=2)

    def along(h):
        return [torch.cholesky_solve(b + h * tb, low + h * tl)]

    x = S.cholesky_solve(dn.dual(b, tb), dn.dual(low, tl))
    close(x.tangent[0], five_point(along)[0], 1e-8)
    for factor in (low, tl):  # of a complex factor's diagonal LAPACK reads the real part here
        factor.diagonal(0, -2, -1).copy_(factor.diagonal(0, -2, -1).real.to(dtype))
    inverse = torch.cholesky_inverse(dn.dual(low, tl))
    close(inverse.tangent[0], five_point(lambda h: [torch.cholesky_inverse(low + h * tl)])[0], 1e-8)


def test_expm_against_mpmath():
    mpmath = pytest.importorskip("mpmath")
    A, t = 2 * draw(3, 3), draw(3, 3, seed=3)
    out = S.expm(dn.dual(A, t))
    with mpmath.workdps(50):
        blocks = torch.cat([torch.cat([A, t], 1), torch.cat([torch.zeros_like(A), A], 1)])
        exact = mpmath.expm(mpmath.matrix(blocks.tolist()))
        wanted = torch.tensor([[float(exact[i, j + 3]) for j in range(3)] for i in range(3)], dtype=REAL)
    close(out.tangent[0], wanted, 1e-13 * float(wanted.abs().max()))


@DTYPES
def test_expm_of_matrices_of_very_different_norm(dtype):
    A = torch.stack([1e-3 * draw(3, 3, dtype=dtype), 20 * draw(3, 3, dtype=dtype, seed=1)])
    t = draw(4, 2, 3, 3, dtype=dtype, seed=2)
    out = S.expm(dn.dual(A, t))
    for k in range(4):
        for b in range(2):
            wanted = torch.func.jvp(L.matrix_exp, (A[b],), (t[k, b],))[1]
            close(out.tangent[k, b], wanted, 1e-12 * max(1.0, float(wanted.abs().max())))


def test_expm_to_third_order():
    A, t = draw(3, 3), draw(3, 3, seed=3)

    def derivative(fn):
        return lambda A: dn.jvp(fn, (A,), (t,))[1]

    third = derivative(derivative(derivative(S.expm)))(A)
    second = derivative(derivative(S.expm))
    close(third, five_point(lambda h: [second(A + h * t)])[0], 1e-8)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5)])
def test_pinv_and_lstsq_of_full_rank(shape):
    A, b = draw(*shape), draw(2, shape[1], 2)
    t, tb = draw(1, *shape, seed=2), draw(1, *b.shape, seed=3)
    found = S.lstsq(dn.dual(A, t), dn.dual(b, tb)).solution
    by_pinv = S.pinv(dn.dual(A, t)) @ dn.dual(b, tb)
    close(found.tangent, by_pinv.tangent, 1e-11)


def test_pinv_along_directions_of_constant_rank():
    left, right, t = draw(4, 2), draw(2, 4, seed=1), draw(1, 4, 2, seed=2)
    out = S.pinv(dn.dual(left, t) @ right)
    close(out.tangent[0], five_point(lambda h: [L.pinv((left + h * t[0]) @ right)])[0], 1e-7)


def test_slogdet_and_det_agree():
    A, t = draw(3, 4, 4), draw(5, 3, 4, 4, seed=1)
    sign, log = S.slogdet(dn.dual(A, t))
    assert not sign.tangent.any()
    close(S.det(dn.dual(A, t)).tangent, L.det(A) * log.tangent, 1e-10)


# Degeneracy.


def test_repeated_eigenvalues_are_named_and_the_others_stay_exact():
    basis = L.qr(draw(4, 4))[0]
    e = torch.tensor([1.0, 2.0, 2.0, 5.0], dtype=REAL)
    A = torch.stack([hermitian(4, 4, dtype=REAL), basis @ torch.diag(e) @ basis.mT])
    A, t = (A + A.mT) / 2, hermitian(3, 2, 4, 4, dtype=REAL, seed=2)
    with pytest.warns(DegenerateWarning, match="eigenvalues 1 and 2 of sample 1 coincide"):
        values, vectors = S.eigh(dn.dual(A, t))
    lost = vectors.tangent.isnan().all(-2)
    assert lost[:, 1].tolist() == [[False, True, True, False]] * 3 and not lost[:, 0].any()
    v, dv, de = vectors.primal, vectors.tangent, values.tangent
    exact = A[1] @ dv[:, 1] + t[:, 1] @ v[1] - dv[:, 1] * values.primal[1] - v[1] * de[:, 1].unsqueeze(-2)
    assert exact[..., [0, 3]].abs().max() < 1e-10
    trace = t[:, 1].diagonal(0, -2, -1).sum(-1)
    close(de[:, 1].sum(-1), trace)
    close(L.eigvalsh(dn.dual(A, t)).tangent, de)  # no warning, no nan


def test_a_direction_that_is_zero_moves_nothing():
    A, t = torch.eye(2, dtype=REAL), torch.stack([torch.zeros(2, 2, dtype=REAL), torch.ones(2, 2, dtype=REAL)])
    with pytest.warns(DegenerateWarning):
        _, vectors = S.eigh(dn.dual(A, t))
    assert not vectors.tangent[0].any() and vectors.tangent[1].isnan().all()


def test_repeated_and_vanishing_singular_values_are_named():
    A, t = torch.diag(torch.tensor([3.0, 2.0, 2.0], dtype=REAL)), draw(3, 3)
    with pytest.warns(DegenerateWarning, match="singular values 1 and 2 coincide"):
        u, s, _ = S.svd(dn.dual(A, t))
    assert u.tangent.isnan().any() and s.tangent.isfinite().all()
    assert L.svdvals(dn.dual(A, t)).tangent.isfinite().all()
    tall = torch.cat([torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=REAL)), torch.zeros(1, 3, dtype=REAL)])
    with pytest.warns(DegenerateWarning, match="singular value 2 vanishes"):
        u, s, _ = S.svd(dn.dual(tall, draw(4, 3)), full_matrices=False)
    assert u.tangent[..., 2].isnan().all() and u.tangent[..., :2].isfinite().all()


@pytest.mark.parametrize(("norm", "order"), [(L.matrix_norm, "nuc"), (L.matrix_norm, 2), (L.norm, "nuc"), (L.norm, -2)])
def test_second_derivatives_of_norms_of_repeated_singular_values_say_so(norm, order):
    least = -1.0 if order == -2 else 1.0
    A, t = torch.diag(torch.tensor([2.0 - least, 2.0, 2.0], dtype=REAL)), draw(3, 3)
    nested = dn.dual(dn.dual(A, t), t)
    with pytest.warns(DegenerateWarning, match="singular values . and . coincide"):
        second = norm(nested, order).tangent.tangent
    assert second.isnan().all()
    apart = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=REAL)) @ (
        torch.eye(3, dtype=REAL) + 0.1 * draw(3, 3, seed=1)
    )
    first = norm(dn.dual(A, t), order).tangent  # no warning
    assert first.isfinite().all()
    if order == "nuc":  # smooth, though its parts are not
        close(first[0], five_point(lambda h: [norm(A + h * t, order)])[0], 1e-8)
    second = norm(dn.dual(dn.dual(apart, t), t), order).tangent.tangent  # no warning where they are apart
    slope = five_point(lambda h: [norm(dn.dual(apart + h * t, t), order).tangent])[0]
    close(second.reshape(-1), slope.reshape(-1), 1e-7)


@pytest.mark.parametrize("order", ["nuc", 2, -2])
@pytest.mark.parametrize(("dim", "keepdim"), [((0, 2), False), ((-1, 0), True), ((2, 1), True)])
def test_norms_of_singular_values_in_any_two_dimensions(order, dim, keepdim):
    A, t = draw(3, 2, 4), draw(3, 2, 4, seed=1)
    norm = L.matrix_norm(dn.dual(A, t), order, dim, keepdim)
    assert torch.equal(norm.primal, L.matrix_norm(A, order, dim, keepdim))
    close(norm.tangent[0], five_point(lambda h: [L.matrix_norm(A + h * t, order, dim, keepdim)])[0], 1e-8)


def test_repeated_eigenvalues_of_a_general_matrix_are_named_and_the_others_stay_exact():
    basis = regular(4, 4)
    A = basis @ torch.diag(torch.tensor([1.0, 2.0, 2.0, 5.0], dtype=REAL)) @ L.inv(basis)
    A, t = torch.stack([regular(4, 4) * 2, A]), draw(2, 4, 4, seed=2)
    with pytest.warns(DegenerateWarning, match="eigenvalues . and . of sample 1 coincide"):
        values, vectors = L.eig(dn.dual(A, t))
    alike = (values.primal[1] - 2).abs() < 1e-8
    assert alike.sum() == 2
    lost = vectors.tangent[0].isnan().all(-2)
    assert lost[1].tolist() == alike.tolist() and not lost[0].any()
    v, dv, de = vectors.primal[1], vectors.tangent[0, 1], values.tangent[0, 1]
    exact = A[1].to(v) @ dv + t[1].to(v) @ v - dv * values.primal[1] - v * de
    assert exact[:, ~alike].abs().max() < 1e-10
    close(L.eigvals(dn.dual(A, t)).tangent.sum(-1).real[0], t.diagonal(0, -2, -1).sum(-1), 1e-10)  # no warning
    with pytest.warns(DegenerateWarning):  # the trace is linear: rounding made 8.0 of this
        second = L.eigvals(dn.dual(dn.dual(A, t), t)).tangent.tangent.reshape(2, 4)
    assert second[0].isfinite().all() and second[1].isnan().any()


@pytest.mark.parametrize("turned", [False, True])
def test_an_eigenvalue_without_an_eigenvector_has_no_derivative(turned):
    A, basis = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=REAL), regular(3, 3)
    A = basis @ A @ L.inv(basis) if turned else A
    with pytest.warns(DegenerateWarning, match="coincide"):
        values, _ = L.eig(dn.dual(dn.dual(A, draw(3, 3)), draw(3, 3)))
    block = (values.primal.primal - 2).abs() < 1e-6
    assert block.sum() == 2
    assert values.tangent.primal.reshape(3).isnan().tolist() == block.tolist()
    assert values.tangent.tangent.reshape(3)[block].isnan().all()


@pytest.mark.parametrize("dual", [False, True])
def test_singular_matrices_raise_with_all_batch_indices(dual):
    A = regular(5, 3, 3)
    A[1] = 0
    A[4, 0] = A[4, 1]
    given = dn.dual(A, torch.ones_like(A)) if dual else A
    for call in (lambda: S.solve(given, draw(5, 3, 1)), lambda: S.inv(given)):
        with pytest.raises(SingularMatrixError, match=r"2 of 5 samples, batch indices 1, 4") as error:
            call()
        assert isinstance(error.value, L.LinAlgError)
    with pytest.raises(SingularMatrixError, match="not positive definite for 1 of 2 samples, batch indices 1"):
        S.cholesky(torch.stack([torch.eye(2), -torch.eye(2)]))


def test_deficient_rank_is_named():
    A = draw(3, 4, 2)
    A[2, :, 1] = 0
    for call in (S.qr, lambda A: S.lstsq(A, draw(3, 4, 1)), lambda A: S.lstsq(A, draw(3, 4, 1), driver="gels")):
        with pytest.raises(SingularMatrixError, match="lacks full rank.*batch indices 2"):
            call(dn.dual(A, torch.ones_like(A)))
    with pytest.raises(SingularMatrixError, match="batch indices 2"):
        S.lstsq(A, draw(3, 4, 1))


@pytest.mark.parametrize("fn", [S.lu, S.qr, S.cholesky, S.eigh, S.svd, S.det, S.slogdet, S.inv, S.expm, S.pinv])
def test_bad_matrices_are_named(fn):
    with pytest.raises(DualInputError, match="int64"):
        fn(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(DualShapeError, match="matrix"):
        fn(torch.ones(2))
    if fn not in (S.lu, S.qr, S.svd, S.pinv):
        with pytest.raises(DualShapeError, match=r"square.*\(2, 3\)"):
            fn(torch.ones(2, 3))


def test_bad_right_hand_sides_are_named():
    A = regular(3, 3)
    with pytest.raises(DualShapeError, match="float32"):
        S.solve(A, torch.ones(3, 1))
    for B, left in ((draw(4, 1), True), (draw(1, 4), False), (draw(4), True)):
        with pytest.raises(DualShapeError, match="do not fit"):
            S.solve(A, B, left=left)
    with pytest.raises(DualShapeError, match="do not fit"):
        S.solve(regular(2, 3, 3), draw(4, 3, 1))
    with pytest.raises(DualInputError, match="mode"):
        S.qr(A, "economic")


def test_under_torch_func_the_same_numbers_come_out():
    A, b, t = regular(2, 3, 3), draw(2, 3, 1), draw(2, 3, 3, seed=4)

    def slope(A):
        return dn.jvp(lambda A: S.expm(A / 9).sum() + L.solve(A, b).sum() + L.slogdet(A)[1].sum(), (A,), (t,))[1]

    leaf = A.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(slope(leaf), leaf)
    close(torch.func.grad(slope)(A), wanted, 1e-10)
