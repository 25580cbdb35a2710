"""What people and programs at both sites do over HTTP: send texts, correct answers, review, train.

A service that is away or starting again is waited for; what has an id is sent again under the same id.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import httpx

from millpond import MillpondError

PATIENCE_S = 60.0
"""How long a request is tried again while its service is away."""


class RequestRefused(MillpondError):
    """A service answered, and said no; the message carries its words."""


class Client:
    """A service's JSON interface; tries again while the service is away or not ready."""

    def __init__(self, url: str, token: str = ""):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=30.0)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        patience_s: float = PATIENCE_S,
    ) -> Any:
        """Return the decoded answer.

        Raises:
            RequestRefused: the service refused the request, or was away for longer than `patience_s`.
        """
        deadline = time.monotonic() + patience_s
        pause_s = 0.05
        while True:
            try:
                response = self._http.request(method, path, json=body, headers=headers)
                if response.status_code not in (429, 502, 503):
                    break
                trouble = f"it answers {response.status_code}: {response.text[:200]}"
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            if time.monotonic() > deadline:
                raise RequestRefused(
                    f"{method} {self._http.base_url}{path}: no answer in {patience_s:.0f} s; {trouble}"
                )
            time.sleep(pause_s)
            pause_s = min(1.0, pause_s * 1.5)
        if response.is_error:
            raise RequestRefused(f"{method} {path} was refused ({response.status_code}): {response.text[:500]}")
        return response.json()


class EdgeClient(Client):
    """A user of the edge."""

    def predict(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Return a prediction for each text: `id`, `label`, `score`, `scores`."""
        predictions: list[dict[str, Any]] = self.request("POST", "/v1/predict", {"texts": list(texts)})["predictions"]
        return predictions

    def correct(self, prediction_id: str, label: str) -> str:
        """Give the right label of a prediction; return the correction's id. Safe to repeat."""
        body = {"id": prediction_id, "label": label}
        answer = self.request("POST", "/v1/feedback", body, headers={"Idempotency-Key": f"demo-{prediction_id}"})
        return str(answer["id"])

    def model(self) -> dict[str, Any]:
        """Return which model is served, what was refused, what waits."""
        model: dict[str, Any] = self.request("GET", "/v1/model")
        return model


class HubClient(Client):
    """An operator or reviewer of the hub."""

    def start_training(self) -> str:
        """Start a training job by hand; return its id."""
        return str(self.request("POST", "/api/v1/jobs", {})["id"])

    def jobs(self) -> list[dict[str, Any]]:
        """Return the training jobs, newest first."""
        jobs: list[dict[str, Any]] = self.request("GET", "/api/v1/jobs")["jobs"]
        return jobs

    def promotions(self) -> list[dict[str, Any]]:
        """Return the promotion records, newest first."""
        promotions: list[dict[str, Any]] = self.request("GET", "/api/v1/promotions")["promotions"]
        return promotions

    def corrections(self, state: str) -> Iterable[dict[str, Any]]:
        """Yield the corrections in a state, page by page."""
        path = f"/api/v1/corrections?state={state}&limit=500"
        page = self.request("GET", path)["corrections"]
        while page:
            yield from page
            page = self.request("GET", f"{path}&after={page[-1]['id']}")["corrections"]

    def counts(self) -> dict[str, int]:
        """Return how many corrections are pending, accepted and rejected."""
        counts: dict[str, int] = self.request("GET", "/api/v1/corrections?limit=1")["counts"]
        return counts

    def accept(self, reviewer: str, correction_ids: Sequence[str]) -> None:
        """Accept corrections in a reviewer's name."""
        decisions = [{"id": correction_id, "decision": "accept"} for correction_id in correction_ids]
        self.request("POST", "/api/v1/reviews", {"reviewer": reviewer, "decisions": decisions})
