"""Temperature scaling: how sure a model may be, learned on validation. Plain NumPy, no torch.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017. All logits are divided by one
temperature: no answer changes, only how sure it is. The exported model's scores are not scaled.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from millpond.learn.evaluate import CalibrationBin, calibration_bins, calibration_error, log_loss

RANGE = (0.05, 20.0)
"""Temperatures that are looked among."""
HALVINGS = 50


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """A temperature, and what a split's answers come to when they are scaled by it."""

    temperature: float
    fitted_on: int
    """Rows that it was fitted on."""
    log_loss: float
    calibration_error: float
    calibration: list[CalibrationBin]


def fit_temperature(probability: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    """Return the temperature at which probabilities [texts, labels] have the least log loss.

    The loss is convex in 1 / temperature, so its slope has one zero at most: it is found by halving.
    """
    z = _log(probability)
    of_truth = z[np.arange(len(truth)), truth].mean()
    low, high = 1 / RANGE[1], 1 / RANGE[0]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        slope = (_softmax(z * middle) * z).sum(1).mean() - of_truth
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 2 / (low + high)


def scale(probability: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Return the probabilities that logits divided by the temperature give."""
    return _softmax(_log(probability) / temperature)


def scaled(
    validation: NDArray[np.float32],
    validation_truth: NDArray[np.int64],
    test: NDArray[np.float32],
    test_truth: NDArray[np.int64],
) -> Scaling:
    """Fit the temperature on validation answers, and measure it on test answers."""
    temperature = fit_temperature(validation, validation_truth)
    probability = scale(test, temperature)
    bins = calibration_bins(probability, test_truth)
    return Scaling(
        temperature=temperature,
        fitted_on=len(validation),
        log_loss=log_loss(probability, test_truth),
        calibration_error=calibration_error(bins),
        calibration=bins,
    )


def _log(probability: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return logits of the probabilities: their logarithms, which differ from any others by a constant a row."""
    logits: NDArray[np.float64] = np.log(np.maximum(probability.astype(np.float64), 1e-38))
    return logits


def _softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    exponent = np.exp(z - z.max(1, keepdims=True))
    probability: NDArray[np.float64] = exponent / exponent.sum(1, keepdims=True)
    return probability
