r"""Connectionist temporal classification, by the forward recursion over the blank-extended target.

.. math:: \alpha_t(s) = \ell_t(z_s) + \log\big(e^{\alpha_{t-1}(s)} + e^{\alpha_{t-1}(s-1)}
          + [z_s \ne z_{s-2}]\, e^{\alpha_{t-1}(s-2)}\big), \qquad
          L = -\log\big(e^{\alpha_T(S)} + e^{\alpha_T(S-1)}\big),

with log-probabilities :math:`\ell_t`. Impossible paths hold a large negative number and not minus infinity: their
derivative is an exact zero either way, and no 0 times infinity is formed. The derivative is that of the value in
unconstrained log-probabilities; torch's backward assumes a log_softmax before it, which gives the same after it.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.registry import Sample

NEVER = -1e30


def _samples(r: Any) -> list[Sample]:
    targets, lengths = torch.tensor([[1, 2, 2], [3, 1, 0]]), torch.tensor([3, 2])
    return [Sample((r(6, 2, 4).log_softmax(-1), targets, torch.tensor([6, 5]), lengths, 0, k)) for k in (0, 1)]


@decomposition("ctc_loss", torch.ctc_loss)
def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Tensor:
    single = log_probs.dim() == 2
    if single:
        log_probs = log_probs.unsqueeze(1)
    steps, batch = log_probs.shape[:2]
    device = log_probs.device
    input_lengths = torch.as_tensor(input_lengths, device=device).reshape(-1).long()
    target_lengths = torch.as_tensor(target_lengths, device=device).reshape(-1).long()
    targets = targets.long()
    longest = int(target_lengths.max()) if batch else 0
    if targets.dim() == 1:  # concatenated
        rows = targets.split(target_lengths.tolist())
    else:
        rows = tuple(row[:n] for row, n in zip(targets, target_lengths.tolist(), strict=True))
    extended = torch.full((batch, 2 * longest + 1), blank, dtype=torch.long, device=device)
    for b, row in enumerate(rows):
        extended[b, 1 : 2 * row.numel() : 2] = row
    skips = torch.zeros_like(extended, dtype=torch.bool)
    skips[:, 2:] = (extended[:, 2:] != extended[:, :-2]) & (extended[:, 2:] != blank)

    def emitted(t: int) -> Tensor:
        # A log-probability of minus infinity means impossible, too.
        found = log_probs[t].gather(1, extended)
        return torch.where(found < NEVER, torch.full_like(found, NEVER), found)

    def never(width: int) -> Tensor:
        return torch.full((batch, width), NEVER, dtype=log_probs.dtype, device=device)

    position = torch.arange(extended.shape[1], device=device)
    alpha = torch.where(position < 2, emitted(0), torch.full_like(never(extended.shape[1]), NEVER))
    for t in range(1, steps):
        stay, step, skip = alpha, torch.cat([never(1), alpha[:, :-1]], 1), torch.cat([never(2), alpha[:, :-2]], 1)
        skip = torch.where(skips, skip[:, : alpha.shape[1]], torch.full_like(stay, NEVER))
        new = torch.logsumexp(torch.stack([stay, step, skip]), 0) + emitted(t)
        new = torch.where(new < NEVER, torch.full_like(new, NEVER), new)
        alpha = torch.where((t < input_lengths)[:, None], new, alpha)
    last = 2 * target_lengths
    ends = torch.stack([last, torch.where(target_lengths > 0, last - 1, last)], 1)
    final = alpha.gather(1, ends)
    final = torch.cat([final[:, :1], torch.where((target_lengths > 0)[:, None], final[:, 1:], never(1))], 1)
    loss = -torch.logsumexp(final, 1)
    if zero_infinity:
        loss = torch.where(loss > -NEVER / 2, torch.zeros_like(loss), loss)
    if reduction == 1:
        return (loss / target_lengths.clamp(min=1).to(loss.dtype)).mean()
    if reduction == 2:
        return loss.sum()
    return loss[0] if single else loss
