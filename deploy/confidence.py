"""Fit and check a student's temperature and its threshold for "none of these", with numpy alone.

The temperature divides the logits before the softmax (Guo et al. 2017, arXiv 1706.04599). With it, about 80 % of the
answers with a probability of 80 % are right, and the predicted classes stay the same. If the largest probability of an
image is below the threshold, the answer is "none of these". config.json, every exported file and the model card hold
both numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy import onnx_tools
from deploy.cli import need, replacing
from deploy.config import Metadata
from deploy.runtimes import RunOn, load, probabilities, softmax

ANSWERED = 0.95  # share of the validation images whose probability reaches the threshold
FEWEST = 40  # fewest images for a fit: with fewer, two or three images would decide both numbers
TEMPERATURES = 0.05, 20.0  # limits of the fitted temperature
BINS = 15  # number of bins of the calibration error


class Calibration(NamedTuple):
    """Hold the calibration error, and the mean confidence, accuracy and share of images of each non-empty bin."""

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray
    error: float


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Calibration:
    """Return the expected calibration error (Guo et al. 2017) and its bins.

    The error is the mean of |accuracy - confidence| over the bins, weighted by their numbers of images.

    confidence: the largest probability of each image (N,); right: whether its class is the true one (N,)
    """
    of_image = np.minimum((confidence * bins).astype(int), bins - 1)
    members = [of_image == b for b in np.unique(of_image)]
    c, a = (np.array([values[m].mean() for m in members]) for values in (confidence, right))
    share = np.array([m.mean() for m in members])
    return Calibration(c, a, share, float((share * abs(a - c)).sum()))


class Confidence(NamedTuple):
    """Hold the result of a fit."""

    temperature: float | None  # None: not fitted, or rejected
    threshold: float | None
    description: str  # lines for the user: the numbers, or the reason for their absence


def fit_confidence(logits: np.ndarray, labels: np.ndarray, metadata: Metadata) -> Confidence:
    """Fit temperature and threshold on validation images; the results depend only on the arguments.

    The temperature is fitted on half of the images of each class. It is kept if it does not increase the calibration
    error of the other half. The threshold uses all images.

    logits: raw (N, C); labels: class indices (N,); metadata: its temperature stays if the new one is rejected
    """
    count, finite = len(labels), np.isfinite(logits).all(-1)
    if count < FEWEST or not finite.all():
        few = f"{count} validation images are fewer than {FEWEST}"
        reason = few if finite.all() else f"the logits of {count - finite.sum()} of {count} images are not finite"
        return Confidence(None, None, f"temperature and threshold are not fitted: {reason}")
    by_class = np.argsort(labels, kind="stable")
    fitting, other = by_class[::2], by_class[1::2]
    kept, line = check_temperature(
        fit_temperature(logits[fitting], labels[fitting]), logits[other], labels[other], metadata
    )
    p = softmax(logits / kept) if kept else probabilities(logits, metadata)
    confidence = p.max(1)
    threshold = float(np.floor(1e4 * np.sort(confidence)[int((1 - ANSWERED) * count + 1e-9)]) / 1e4)
    threshold = min(threshold, 0.9999)  # in lower precision a probability of 1 becomes a little less
    answered = confidence >= threshold
    right = (p.argmax(1) == labels)[answered].mean()
    shares = (
        f"{100 * answered.mean():.1f} % of {count} validation images are answered, {100 * right:.1f} % of them right"
    )
    return Confidence(kept, threshold, f'{line}\n"none of these" below a probability of {threshold:.4f}: {shares}')


def fit_file(file: Path, images: np.ndarray, labels: np.ndarray) -> str:
    """Fit temperature and threshold of an exported ONNX file, write them into it, and return lines for the user.

    A number that is not fitted keeps its present value in the file. The file runs on the CPU, and onnx must be
    installed.

    images: validation images, uint8 (N, H, W, C); labels: their class indices
    """
    onnx, runtime = need("onnx", "pip install onnx"), load(file, RunOn("cpu"))
    found = fit_confidence(runtime.run_in_parts(images, 64), labels, runtime.metadata)
    numbers: dict[str, Any] = {"temperature": found.temperature, "threshold": found.threshold}
    described = replace(runtime.metadata, **{name: value for name, value in numbers.items() if value is not None})
    with replacing(file) as partial:
        onnx_tools.write(onnx.load(file), described, partial)
    return found.description


def check_temperature(
    temperature: float | None, logits: np.ndarray, labels: np.ndarray, metadata: Metadata
) -> tuple[float | None, str]:
    """Return the temperature, or None if it increases the calibration error, and a line for the user.

    logits, labels: of images that the fit of the temperature did not use
    """
    if temperature is None:
        low, high = TEMPERATURES
        outside = f"the best value is not between {low:g} and {high:g} (if every answer is right, it is 0)"
        return None, f"temperature is not fitted: {outside}"
    right = logits.argmax(1) == labels
    before, after = (
        calibration(p.max(1), right).error for p in (probabilities(logits, metadata), softmax(logits / temperature))
    )
    errors = f"calibration error {100 * before:.1f} % before, {100 * after:.1f} % after"
    about = f"{errors}, on {len(labels)} validation images that the fit did not use"
    if after > before:
        return None, f"temperature {temperature:.4g} is rejected, {metadata.temperature or 1.0:.4g} stays: {about}"
    return temperature, f"temperature {temperature:.4g}: {about}"


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the temperature that minimises the negative log-likelihood; None if it is outside TEMPERATURES.

    This likelihood is convex in 1 / temperature, so a bisection finds where its slope is 0. If every answer is right,
    the best temperature is 0.
    """
    logits = logits.astype(np.float64) - logits.max(1, keepdims=True)
    targets = logits[np.arange(len(labels)), labels].mean()
    low, high = np.log(TEMPERATURES)
    if (logits.argmax(1) == labels).all() or slope(logits, targets, low) <= 0 or slope(logits, targets, high) > 0:
        return None
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(logits, targets, middle) > 0 else (low, middle)
    return float(f"{np.exp(middle):.4g}")


def slope(logits: np.ndarray, targets: float, log_temperature: float) -> float:
    """Return the derivative of the mean negative log-likelihood with respect to 1 / temperature.

    targets: mean logit of the true class
    """
    return float((softmax(logits * np.exp(-log_temperature)) * logits).sum(1).mean() - targets)
