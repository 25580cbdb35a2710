"""Temperature scaling against what is known of it."""

from __future__ import annotations

import numpy as np
import pytest

from millpond.learn.calibrate import fit_temperature, scale, scaled
from millpond.learn.evaluate import log_loss


def answers(temperature: float, seed: int, labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return answers of a model that is calibrated when its logits are divided by `temperature`, and the truth."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (20_000, labels))
    honest = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    truth = (honest.cumsum(1) < rng.random((len(z), 1))).sum(1)
    said = np.exp(z * temperature)
    return (said / said.sum(1, keepdims=True)).astype(np.float32), truth


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_a_model_is_off_by_is_found(temperature: float) -> None:
    probability, truth = answers(temperature, seed=1)
    assert fit_temperature(probability, truth) == pytest.approx(temperature, rel=0.05)


def test_scaling_makes_a_model_that_is_too_sure_calibrated_and_changes_no_answer() -> None:
    validation, test = answers(3.0, seed=1), answers(3.0, seed=2)
    found = scaled(*validation, *test)
    assert (found.fitted_on, sum(b.rows for b in found.calibration)) == (20_000, 20_000)
    assert found.calibration_error < 0.02
    assert found.log_loss < log_loss(test[0], test[1]) - 0.1
    assert (scale(test[0], found.temperature).argmax(1) == test[0].argmax(1)).all()


def test_answers_that_are_all_right_or_all_wrong_have_a_temperature_too() -> None:
    sure = np.array([[1.0, 0.0]] * 5, np.float32)
    assert fit_temperature(sure, np.zeros(5, np.int64)) == pytest.approx(0.05, rel=0.1)
    assert fit_temperature(sure, np.ones(5, np.int64)) == pytest.approx(20, rel=0.1)
