"""Run train.py with a part of a loss, or with the formula of the official code, for the ablations.

python examples/paper/ablation.py nkd_without_target --kd nkd --teacher ...    # any flags of train.py
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
from zipf import zipf_rows  # noqa: E402

import train  # noqa: E402
from kdlite import uskd_loss  # noqa: E402
from kdlite.terms import centred, cross_entropy, log_normalized  # noqa: E402


def nkd_without_target(
    student: Tensor, teacher: Tensor, target: Tensor, *, gamma: float, temperature: float, reduction: str
) -> Tensor:
    """Return NKD's non-target term of each row, which is eq. 7 of the paper without the first term."""
    assert reduction == "none"
    student, teacher = (centred(logits) / temperature for logits in (student, teacher.detach()))
    n_t = log_normalized(teacher, target).exp()
    return gamma * temperature**2 * cross_entropy(n_t, log_normalized(student, target))


def uskd_ranked_by_log(
    logits: Tensor, weak_logits: Tensor, target: Tensor, *, alpha: float, beta: float, mu: float, **means: Any
) -> Tensor:
    """Return USKD of each row, ranked by log S instead of S, as in the official code since July 2023.

    means: the arguments reduction and group of uskd_loss
    """
    log_s, w = logits.float().log_softmax(1), weak_logits.float().softmax(1)
    is_target = F.one_hot(target, logits.shape[1]).bool()
    with torch.no_grad():
        w_t, log_s_t = ((x * is_target).sum(1, keepdim=True) for x in (w, log_s))
        score = w / (1 - w_t + 1e-6) + log_s / (1 - log_s_t)
        rank = score.argsort(1, descending=True).argsort(1) + 1
        z = (1 / rank).masked_fill(is_target, 0)
        z = z / z.sum(1, keepdim=True)
    log_n = logits.float().masked_fill(is_target, -torch.inf).log_softmax(1).masked_fill(is_target, 0)
    rest = uskd_loss(logits, weak_logits, target, alpha=alpha, beta=0.0, mu=mu, **means)
    return rest - beta * (z * log_n).sum(1)


def uskd_ranked_by_weak(
    logits: Tensor, weak_logits: Tensor, target: Tensor, *, alpha: float, beta: float, mu: float, **means: Any
) -> Tensor:
    """Return USKD of each row, ranked by the weak head alone; for ``means`` see uskd_ranked_by_log."""
    rest = uskd_loss(logits, weak_logits, target, alpha=alpha, beta=0.0, mu=mu, **means)
    return rest + zipf_rows(centred(logits), centred(weak_logits), target, beta)


VARIANTS: dict[str, tuple[str, Any]] = {
    "nkd_without_target": ("nkd_loss", nkd_without_target),
    "uskd_ranked_by_log": ("uskd_loss", uskd_ranked_by_log),
    "uskd_ranked_by_weak": ("uskd_loss", uskd_ranked_by_weak),
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"ablation.py: error: give a variant as the first argument, one of {', '.join(VARIANTS)}")
    setattr(train, *VARIANTS[sys.argv[1]])
    sys.exit(train.main(sys.argv[2:]))
