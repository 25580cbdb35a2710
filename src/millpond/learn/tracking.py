"""Runs in MLflow: on the server that MLFLOW_TRACKING_URI names, or in a local store without one.

Tracking never ends a training and never holds it up for long: after the first failure there is one warning, and no
more is tried. The library is only imported where runs are tracked.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millpond import MillpondError
from millpond.learn.progress import Epoch

if TYPE_CHECKING:
    from millpond.learn.run import Run

EXPERIMENT = "millpond"
LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""What MLflow is told where the environment does not say otherwise: seconds and tries at a server that is away."""
MAX_PARAMETER_CHARACTERS = 500


class TrackingError(MillpondError):
    """Runs cannot be tracked as asked for; the message says what to install or to change."""


class Tracker:
    """One run in MLflow, from before the first step to the end."""

    def __init__(self, uri: str, home: Path, warn: Callable[[str], None]) -> None:
        self.uri = uri
        self.run_id = ""
        self._warn = warn
        self._client: Any = None
        self._home = home

    @property
    def is_on(self) -> bool:
        """Return whether what is logged arrives, so far."""
        return self._client is not None

    def start(self, directory: Path, tags: dict[str, str]) -> None:
        """Begin a run, or take up that of the same directory that did not end.

        Raises:
            TrackingError: MLflow is not installed.
        """
        client_class = _import_client()
        with self._guarded("begun"):
            client = client_class(tracking_uri=self.uri)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                # Beside a local database the files would go into the working directory.
                place = (self._home / "artifacts").as_uri() if self.uri.startswith("sqlite:") else None
                experiment_id = client.create_experiment(EXPERIMENT, artifact_location=place)
            else:
                experiment_id = experiment.experiment_id
            tags |= {"millpond.directory": str(directory)}
            shown = str(directory).replace("'", "")
            unfinished = client.search_runs(
                [experiment_id],
                f"tags.`millpond.directory` = '{shown}' and attributes.status = 'RUNNING'",
                max_results=1,
            )
            if unfinished:
                self.run_id = unfinished[0].info.run_id
            else:
                self.run_id = client.create_run(experiment_id, run_name=directory.name, tags=tags).info.run_id
            self._client = client

    def epoch(self, epoch: Epoch) -> None:
        """Log what an epoch came to."""
        if self.is_on:
            values = {
                "loss": epoch.loss,
                "accuracy": epoch.accuracy,
                "validation_loss": epoch.validation_loss,
                "validation_accuracy": epoch.validation_accuracy,
                "learning_rate": epoch.learning_rate,
                "seconds": epoch.seconds,
            }
            with self._guarded("logged to"):
                self._log({key: value for key, value in values.items() if value is not None}, step=epoch.epoch)

    def finish(self, run: Run) -> None:
        """Log options, test metrics, pictures, report and model, and end the run."""
        if self.is_on:
            training = run.trained.training
            with self._guarded("finished"):
                metrics = {f"test_{key}": value for key, value in run.evaluation.metrics.items()}
                if run.scaling is not None:
                    metrics["temperature"] = run.scaling.temperature
                self._log(metrics, step=training.best)
                for key, value in run.options().items():
                    self._client.log_param(self.run_id, key, str(value)[:MAX_PARAMETER_CHARACTERS])
                self._client.log_artifacts(self.run_id, str(run.directory / "model"), "model")
                for path in sorted(run.directory.iterdir()):
                    if path.is_file():
                        self._client.log_artifact(self.run_id, str(path))
                self._client.set_terminated(self.run_id, "FAILED" if training.ended == "diverged" else "FINISHED")

    def fail(self) -> None:
        """Mark the run as failed."""
        if self.is_on:
            with self._guarded("finished"):
                self._client.set_terminated(self.run_id, "FAILED")

    def _log(self, metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._client.log_metric(self.run_id, key, value, step=step)

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Turn any failure into one warning, and track no more."""
        try:
            yield
        except Exception as error:
            self._client = None
            why = str(error).strip().partition("\n")[0][:300]
            self._warn(f"the run in MLflow ({self.uri}) cannot be {what}: {why}. Training goes on without it.")


def tracker(wanted: bool, home: Path, warn: Callable[[str], None]) -> Tracker | None:
    """Return where to track runs: MLFLOW_TRACKING_URI, or if they are `wanted` a local store; None: nowhere.

    Raises:
        TrackingError: MLflow is not installed.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri and not wanted:
        return None
    _import_client()
    place = home / "mlflow"
    if not uri:
        place.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{place / 'mlflow.db'}"
    return Tracker(uri, place, warn)


def _import_client() -> Any:
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # it tells of each table that it makes
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        import sqlalchemy  # noqa: F401  (MLflow's local store needs it, but does not ask for it)
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise TrackingError(
            f"tracking runs needs MLflow, which is not installed ({error}). Install it: "
            "pip install 'millpond[mlflow]'. Or leave out --mlflow, and unset MLFLOW_TRACKING_URI."
        ) from error
    return MlflowClient
