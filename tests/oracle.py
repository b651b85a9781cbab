"""Compute the paper's formulas in plain float64 loops, written from the paper and independent of kdlite.

The functions take lists of floats and do not use torch. Those of NKD take one sample, those of USKD a batch.
"""

import math


def softmax(logits, temperature=1.0, leave_out=None):
    """Return the softmax of a list over all classes except ``leave_out``, which gets 0."""
    kept = [i for i in range(len(logits)) if i != leave_out]
    top = max(logits[i] for i in kept)
    powers = {i: math.exp((logits[i] - top) / temperature) for i in kept}
    total = math.fsum(powers.values())
    return [powers[i] / total if i in powers else 0.0 for i in range(len(logits))]


def log_softmax(logits, temperature=1.0, leave_out=None):
    kept = [i for i in range(len(logits)) if i != leave_out]
    top = max(logits[i] for i in kept)
    log_total = math.log(math.fsum(math.exp((logits[i] - top) / temperature) for i in kept))
    return [(logits[i] - top) / temperature - log_total if i in kept else 0.0 for i in range(len(logits))]


def nkd_row(student, teacher, t, gamma, temperature):
    target_term = -softmax(teacher)[t] * log_softmax(student)[t]
    normalized_teacher = softmax(teacher, temperature, leave_out=t)
    log_normalized_student = log_softmax(student, temperature, leave_out=t)
    non_target = math.fsum(normalized_teacher[i] * log_normalized_student[i] for i in range(len(student)) if i != t)
    return target_term - gamma * temperature**2 * non_target


def nkd_row_gradient(student, teacher, t, gamma, temperature):
    """Return d nkd_row / d student, derived by hand."""
    s, t_prob = softmax(student), softmax(teacher)[t]
    p = softmax(student, temperature, leave_out=t)
    q = softmax(teacher, temperature, leave_out=t)
    not_t = math.fsum(s[i] for i in range(len(s)) if i != t)  # 1 - S_t without cancellation
    return [
        -t_prob * not_t if i == t else t_prob * s[i] + gamma * temperature * (p[i] - q[i]) for i in range(len(student))
    ]


def nkd_topk_row(student, t, teacher_target, teacher_top, gamma):
    """Return NKD from the teacher's log T_t and from its log T_i of some classes.

    ``teacher_top`` maps a class i to log T_i. All other classes together are one class, for student and teacher.
    """
    log_n, n = log_softmax(student, leave_out=t), softmax(student, leave_out=t)
    not_t = -math.expm1(teacher_target)  # 1 - T_t
    loss = -math.exp(teacher_target) * log_softmax(student)[t]
    rest = not_t
    for i, log_t in teacher_top.items():
        loss -= gamma * math.exp(log_t) / not_t * log_n[i]
        rest -= math.exp(log_t)
    n_rest = math.fsum(n[i] for i in range(len(n)) if i != t and i not in teacher_top)
    return loss - (gamma * rest / not_t * math.log(n_rest) if n_rest else 0.0)


def zipf_weights(strong, weak, t):
    """Return N(Z): 0 for the target, and for the others 1 / (rank by descending R), renormalised."""
    s, w = softmax(strong), softmax(weak)
    not_s = math.fsum(s[i] for i in range(len(s)) if i != t)
    not_w = math.fsum(w[i] for i in range(len(w)) if i != t)
    r = [w[i] / not_w + s[i] / not_s for i in range(len(s))]
    order = sorted(range(len(r)), key=lambda i: -r[i])  # the sort is stable, so the class index orders ties
    reciprocal = [0.0] * len(r)
    for rank, i in enumerate(order, start=1):
        reciprocal[i] = 1 / rank
    reciprocal[t] = 0.0
    total = math.fsum(reciprocal)
    return [value / total for value in reciprocal]


def uskd_rows(strong, weak, targets, alpha, beta, mu, label_smoothing):
    """Return USKD of a batch, one loss per row; ``targets`` has the class probabilities of each row."""
    probs = [softmax(row) for row in strong]
    classes = range(len(strong[0]))
    mean = math.fsum(v[k] * s[k] ** 2 for s, v in zip(probs, targets) for k in classes) / len(strong)
    losses = []
    for row, weak_row, s, v in zip(strong, weak, probs, targets):
        log_s = log_softmax(row)
        target_term = -math.fsum(v[k] * (s[k] ** 2 + 1 - mean) * log_s[k] for k in classes)
        top_two = sorted(classes, key=lambda k: -v[k])[:2]
        non_target = 0.0
        for k in top_two:
            if v[k] > 0:
                log_n = log_softmax(row, leave_out=k)
                z = zipf_weights(row, weak_row, k)
                share = v[k] / (v[top_two[0]] + v[top_two[1]])
                non_target -= share * math.fsum(z[i] * log_n[i] for i in classes if i != k)
        log_w = log_softmax(weak_row)
        smoothed = [(1 - label_smoothing) * v[k] + label_smoothing / len(v) for k in classes]
        weak_term = -math.fsum(smoothed[k] * log_w[k] for k in classes)
        losses.append(alpha * target_term + beta * non_target + mu * weak_term)
    return losses


def uskd_gradient(strong, weak, labels, alpha, beta, mu, label_smoothing):
    """Return d mean(uskd) / d strong and d mean(uskd) / d weak for class indices, derived by hand."""
    n, classes = len(strong), range(len(strong[0]))
    probs = [softmax(row) for row in strong]
    mean = math.fsum(s[t] ** 2 for s, t in zip(probs, labels)) / n
    d_strong, d_weak = [], []
    for row, weak_row, s, t in zip(strong, weak, probs, labels):
        p_t = s[t] ** 2 + 1 - mean
        r, z = softmax(row, leave_out=t), zipf_weights(row, weak_row, t)
        not_t = math.fsum(s[i] for i in classes if i != t)
        d_strong.append(
            [(-alpha * p_t * not_t if i == t else alpha * p_t * s[i] + beta * (r[i] - z[i])) / n for i in classes]
        )
        w = softmax(weak_row)
        smoothed = [(1 - label_smoothing) * (i == t) + label_smoothing / len(w) for i in classes]
        d_weak.append([mu * (w[i] - smoothed[i]) / n for i in classes])
    return d_strong, d_weak
