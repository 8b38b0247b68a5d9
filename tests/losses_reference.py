"""The losses in numpy float64, one token at a time, with gradients written out by hand."""

from types import SimpleNamespace

import numpy as np


def logits(hidden, head, softcap=0.0, scale=1.0):
    """The logits of one token and the derivative of each with respect to (hidden @ head)."""
    raw = scale * (hidden @ head)
    if not softcap:
        return raw, np.full_like(raw, scale)
    capped = softcap * np.tanh(raw / softcap)
    return capped, scale * (1 - np.tanh(raw / softcap) ** 2)


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def rank(z, y):
    """The place of y when the vocabulary is sorted by falling logit, equal logits by rising index."""
    return int(np.flatnonzero(np.argsort(-z, kind="stable") == y)[0])


def truncate(u, k):
    """-infinity but for the k first when the vocabulary is sorted by falling logit, equal logits by rising index."""
    first = np.argsort(-u, kind="stable")[: k or len(u)]
    truncated = np.full_like(u, -np.inf)
    truncated[first] = u[first]
    return truncated


def describe(z, y):
    log_p = log_softmax(z)
    p = np.exp(log_p)
    return SimpleNamespace(loss=-log_p[y], entropy=-(p * log_p).sum(), top_probability=p.max(), rank=rank(z, y))


def loss(
    hidden,
    head,
    targets,
    mask,
    teacher=None,
    *,
    weight=0.0,
    temperature=1.0,
    top_k=0,
    z_loss=0.0,
    softcap=0.0,
    logit_scale=1.0,
    teacher_softcap=0.0,
    teacher_logit_scale=1.0,
):
    """Terms of each token (mask applied), and the gradient of their sum.

    Args:
      teacher: (hidden, head) or None.
      weight: array broadcasting to [B, T], or a function of (student, teacher) as `describe` gives them.
    """
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    teacher = teacher and tuple(np.asarray(x, np.float64) for x in teacher)
    targets, mask = np.asarray(targets), np.asarray(mask, np.float64)
    names = ["cross_entropy", "correct"]
    if teacher:
        names += ["distillation_kl", "teacher_cross_entropy", "teacher_correct"] + ["token_weight"] * callable(weight)
    total, parts = np.zeros(targets.shape), {name: np.zeros(targets.shape) for name in names}
    dhidden, dhead = np.zeros_like(hidden), np.zeros_like(head)
    if not callable(weight):
        weight_at = np.broadcast_to(np.asarray(weight, np.float64), targets.shape)

    for at in np.ndindex(targets.shape):
        if mask[at] == 0:
            continue
        m, y = mask[at], targets[at]
        z, slope = logits(hidden[at], head, softcap, logit_scale)
        log_p = log_softmax(z)
        p, lse = np.exp(log_p), z[0] - log_p[0]
        hard = (np.arange(len(z)) == y).astype(np.float64)
        term = {"cross_entropy": -log_p[y], "correct": rank(z, y) == 0}
        value, error = -log_p[y] + z_loss * lse**2, p - hard + 2 * z_loss * lse * p
        if teacher:
            u, _ = logits(teacher[0][at], teacher[1], teacher_softcap, teacher_logit_scale)
            log_q = log_softmax(truncate(u, top_k) / temperature)
            q = np.exp(log_q)
            log_q = np.where(q > 0, log_q, 0.0)  # 0 log 0 = 0
            w = weight(describe(z, y), describe(u, y)) if callable(weight) else weight_at[at]
            term["token_weight"] = w
            value += w * (-(q * log_p).sum() + log_p[y])
            error += w * (hard - q)
            term["distillation_kl"] = (q * (log_q - log_p)).sum()
            term["teacher_cross_entropy"], term["teacher_correct"] = -log_softmax(u)[y], rank(u, y) == 0
        total[at] = m * value
        for name in names:
            parts[name][at] = m * term[name]
        dhidden[at] = head @ (m * error * slope)
        dhead += np.outer(hidden[at], m * error * slope)
    return SimpleNamespace(total=total, weight=mask, parts=parts, dhidden=dhidden, dhead=dhead)
