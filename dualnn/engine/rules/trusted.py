"""Ops whose directions come from torch's own reverse mode (`by_reverse`): a list of names, no rule of ours.

The conformance suite has found each of them right, at first and second order, on the torch releases of
`releases.TESTED`; its committed table says so line by line, and its tests repeat it. On another release they raise.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.by_reverse import reverse_rule
from dualnn.engine.generic import register_inplace
from dualnn.engine.registry import RULES, register

# Found in torch, torch.Tensor, torch.special, torch.nn.functional's kernels and torch.linalg under these names.
ELEMENTWISE = (
    "entr i0 i0e i1 i1e xlog1py logaddexp2 mvlgamma multigammaln fmod frexp nextafter prelu glu angle polar "
    "complex real imag conj conj_physical view_as_complex view_as_real fill"
)
SCANS = (
    "prod cumprod logcumsumexp nansum nanmean std_mean var_mean median nanmedian kthvalue mode quantile nanquantile "
    "diff trapezoid trapz cumulative_trapezoid corrcoef cov dist renorm cosine_similarity pairwise_distance "
    "msort gradient"
)
MOVES = (
    "index_add index_copy index_fill index_put index_reduce put take masked_scatter scatter_reduce select_scatter "
    "slice_scatter diagonal_scatter as_strided as_strided_scatter _unsafe_masked_index "
    "_unsafe_masked_index_put_accumulate sum_to_size "
    "vstack hstack dstack row_stack column_stack block_diag cartesian_prod combinations meshgrid atleast_3d "
    "hsplit vsplit dsplit unsafe_chunk unsafe_split rot90 fliplr flipud diagflat channel_shuffle constant_pad_nd "
    "im2col col2im alias_copy as_strided_copy diagonal_copy expand_copy narrow_copy permute_copy select_copy "
    "slice_copy split_copy split_with_sizes_copy squeeze_copy t_copy transpose_copy unbind_copy unfold_copy "
    "unsqueeze_copy view_copy view_as_complex_copy view_as_real_copy"
)
LINALG = (
    "trace kron cross inner vdot tensordot addbmm logdet cholesky cholesky_inverse cholesky_solve inverse det slogdet "
    "pinverse svd lu lu_solve lu_unpack triangular_solve ormqr orgqr matrix_exp matrix_power qr"
)
TORCH_LINALG = (
    "cholesky cholesky_ex cond cross det diagonal eig eigh eigvals eigvalsh householder_product inv inv_ex lstsq lu "
    "lu_factor lu_factor_ex lu_solve matrix_exp matrix_norm matrix_power multi_dot norm pinv qr slogdet solve "
    "solve_ex solve_triangular svd svdvals tensorinv tensorsolve vander vecdot matrix_sqrth polar"
)
NETWORKS = (
    "grid_sampler grid_sampler_2d grid_sampler_3d max_unpool2d max_unpool3d "
    "margin_ranking_loss poisson_nll_loss triplet_margin_loss cosine_embedding_loss hinge_embedding_loss "
    "multilabel_margin_loss "
    "native_batch_norm native_group_norm _native_batch_norm_legit stft istft upsample_trilinear3d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa affine_grid_generator"
)
ATEN = (
    "_batch_norm_with_update _safe_softmax.default _softmax_backward_data _upsample_bilinear2d_aa "
    "max_pool2d_with_indices_backward.default native_dropout_backward.default slice.Tensor"
)


def _trust(found: Iterable[Callable], name: str) -> None:
    new = [f for f in dict.fromkeys(found) if f not in RULES]
    if new:
        register(*new, rule=reverse_rule)
        inplace = [g for g in (getattr(torch, name + "_", None), getattr(Tensor, name + "_", None)) if g is not None]
        if inplace and not any(g in RULES for g in inplace):
            register_inplace(name, reverse_rule, new)


def _attribute(home: Any, name: str) -> Callable | None:
    found = getattr(home, name, None)
    if found is not None and not callable(found):
        return getattr(found, "__get__", None)  # a property: its getter arrives
    return found


def serve_the_rest() -> None:
    """Register every op of the list that no rule serves (called after all rules are registered)."""
    homes = [torch, Tensor, torch.special, torch._C._nn, torch._VF]
    for name in " ".join((ELEMENTWISE, SCANS, MOVES, LINALG, NETWORKS)).split():
        _trust([f for f in (_attribute(home, name) for home in homes) if f is not None], name)
    for name in TORCH_LINALG.split():
        f = getattr(torch.linalg, name, None)
        if f is not None:
            _trust([f], f"linalg_{name}")
    for name in ATEN.split():
        packet, _, overload = name.partition(".")
        f = getattr(torch.ops.aten, packet, None)
        if f is not None:
            _trust([getattr(f, overload) if overload else f], name)
    for getter in ("H", "mH"):
        _trust([getattr(Tensor, getter).__get__], getter)
