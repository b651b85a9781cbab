"""Compute losses from the formulas of several papers, for train.py --kd examples/losses.py:dkd, or for your own loop.

The arguments are student_logits (N, C), teacher_logits (N, C) and target (N,), class indices. tf_kd and ps_kd need no
teacher; ps_kd takes the student's own earlier logits. Each loss except dist returns a value for each row, (N,). Add the
loss to the cross-entropy, and tune its weights on your images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def kl(teacher_log_p: Tensor, student_log_p: Tensor) -> Tensor:
    """Return KL(teacher || student) of each row; a class that the teacher excludes adds 0."""
    p = teacher_log_p.exp()
    return (p * (teacher_log_p - student_log_p).masked_fill(p == 0, 0.0)).sum(1)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Return decoupled KD, arXiv 2203.08679: alpha KL(b^T || b^S) + beta KL(p^T || p^S), times temperature squared.

    b has two probabilities: that of the target, and the sum of the others. p is the distribution over the other
    classes. Both are at the temperature.
    """
    student, teacher = (x / temperature for x in (student_logits, teacher_logits))
    others = torch.ones_like(student, dtype=torch.bool).scatter(1, target.unsqueeze(1), False)
    masked = [x.masked_fill(~others, -torch.inf) for x in (teacher, student)]
    odds = [x.gather(1, target.unsqueeze(1)) - m.logsumexp(1, keepdim=True) for x, m in zip((teacher, student), masked)]
    binary = kl(*(torch.cat([F.logsigmoid(x), F.logsigmoid(-x)], 1) for x in odds))
    return temperature**2 * (alpha * binary + beta * kl(*(m.log_softmax(1) for m in masked)))


def standardised_kd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, weight: float = 9.0, temperature: float = 2.0
) -> Tensor:
    """Return weight * temperature^2 * KL(teacher || student), arXiv 2403.01733.

    The logits of each row are standardised (mean 0, deviation 1), then divided by the temperature.
    """
    student, teacher = (
        (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-12).sqrt() / temperature
        for x in (student_logits, teacher_logits)
    )
    return weight * temperature**2 * kl(teacher.log_softmax(1), student.log_softmax(1))


def wttm(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """Return weighted transformed teacher matching (arXiv 2402.11148), sum_i T_i^(1/tau) KL(T^(1/tau) || S).

    Only the teacher has the temperature tau. The weight of a row is the sum of T_i^(1/tau). In the KL divergence
    T^(1/tau) is divided by this sum.
    """
    power_sum = (teacher_logits.log_softmax(1) / temperature).exp().sum(1)
    return power_sum * kl((teacher_logits / temperature).log_softmax(1), student_logits.log_softmax(1))


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return DIST (arXiv 2205.10536) as one value: beta (1 - r of rows) + gamma (1 - r of columns).

    The value is multiplied by the temperature squared. r is the mean of Pearson's correlations between the
    probabilities of student and teacher at the temperature.
    """
    s, t = ((x / temperature).softmax(1) for x in (student_logits, teacher_logits))
    return temperature**2 * (beta * pearson_distance(s, t, 1) + gamma * pearson_distance(s, t, 0))


def pearson_distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    return 1 - F.cosine_similarity(a, b, dim=dim, eps=1e-8).mean()


def tf_kd(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    weight: float = 1.0,
    correct: float = 0.99,
    temperature: float = 20.0,
) -> Tensor:
    """Return teacher-free KD by regularisation (arXiv 1909.11723): the teacher is uniform except at the target.

    The loss is weight * temperature^2 * KL(p^d || S), with p^d and S at the temperature. At temperature 1, p^d of the
    target is ``correct``. The loss ignores teacher_logits.
    """
    classes = student_logits.shape[1]
    p_d = torch.full_like(student_logits, (1 - correct) / (classes - 1)).scatter(1, target.unsqueeze(1), correct)
    virtual_teacher = (p_d.log() / temperature).log_softmax(1)
    return weight * temperature**2 * kl(virtual_teacher, (student_logits / temperature).log_softmax(1))


def ps_kd(student_logits: Tensor, past_logits: Tensor, target: Tensor, alpha: float = 0.8) -> Tensor:
    """Return progressive self-KD (arXiv 2006.12000) without its cross-entropy: alpha * (H(past, S) - H(target, S)).

    past_logits: logits of the student itself one epoch before. The paper's alpha grows over the epochs to 0.8.
    """
    log_s = student_logits.log_softmax(1)
    past = -(past_logits.softmax(1) * log_s).sum(1)
    return alpha * (past - F.nll_loss(log_s, target, reduction="none"))
