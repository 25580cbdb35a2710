"""A trial as Ray Tune sees it: a step is an epoch, done in a process of its own. Ray's workers load this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import tune

from millpond.learn.tune.trial_process import Setup, TrialEnded, TrialProcess

OBJECTIVE = "objective"
"""What the search lowers: the best so far of a trial's epochs."""


class TrialRunner(tune.Trainable):  # type: ignore[misc]  # mypy does not look into Ray
    """Runs one trial after the other; Ray reuses it, and so its process."""

    _epoch: int
    _best: float

    def setup(self, config: dict[str, Any], setup: Setup, metric: str, failed: float, prefix: Sequence[str]) -> None:
        """Begin the first trial."""
        self._process = TrialProcess(setup, prefix)
        self._metric, self._failed = metric, failed
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train an epoch and return what came of it; a trial that fails is done, and worse than all others."""
        answer = self._process.next_answer()
        if isinstance(answer, TrialEnded):
            objective = self._failed if answer.error else self._best
            return {"epoch": self._epoch, OBJECTIVE: objective, "error": answer.error} | _OVER
        self._epoch = answer.epoch
        self._best = min(self._best, answer.loss if self._metric == "loss" else 1 - answer.accuracy)
        result = {
            "epoch": answer.epoch,
            "loss": answer.loss,
            "accuracy": answer.accuracy,
            "training_loss": answer.training_loss,
            "seconds": answer.seconds,
            OBJECTIVE: self._best,
            "error": "",
        }
        return result | (_OVER if answer.last else {})

    def cleanup(self) -> None:
        """End the process."""
        self._process.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: the record is what a search goes on from."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing."""

    def _begin(self, parameters: dict[str, Any]) -> None:
        self._epoch = 0
        self._best = float("inf")
        self._process.start(parameters)


_OVER = {"done": True, "done_by_itself": True}
