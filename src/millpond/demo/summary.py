"""What the demo found: a dozen lines for people, one object for programs."""

from __future__ import annotations

from typing import Any

import msgspec


class MeasuredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model and how it did on rows that never trained it; accuracies are shares between 0 and 1."""

    version: str
    test_accuracy: float
    corrections_accuracy: float


class Corrections(msgspec.Struct, frozen=True, kw_only=True):
    """How many corrections the edge took in, and how many were accepted."""

    sent: int
    accepted: int
    held_out: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The demo's result."""

    corpus: str
    corpus_why: str
    official_test: bool
    rows: dict[str, int]
    v1: MeasuredModel
    v2: MeasuredModel
    promoted: bool
    reasons: list[str]
    served: str
    target: float | None
    target_reached: bool | None
    corrections: Corrections
    failed_requests: int
    seconds: dict[str, float]

    def as_json(self) -> bytes:
        """Return the summary as an indented JSON object."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)

    def lines(self) -> list[tuple[str, str]]:
        """Return (what, figures) for each line that a person reads."""
        stages: dict[str, Any] = {stage: took for stage, took in self.seconds.items() if stage != "total"}
        split = "official test split" if self.official_test else "held-out part, NOT the official test split"
        return [
            ("corpus", f"{self.corpus}: {self.corpus_why}"),
            (
                "sizes",
                f"{self.rows['train']:,} reviews train v1, {self.rows['traffic']:,} are the edge's traffic, "
                f"{self.rows['test']:,} test ({split})",
            ),
            ("stages", " · ".join(f"{stage.replace('_', ' ')} {took:.1f} s" for stage, took in stages.items())),
            (
                "corrections",
                f"{self.corrections.sent:,} answers of v1 corrected at the edge, "
                f"{self.corrections.accepted:,} accepted (by a rule in the reviewer's place), "
                f"{self.corrections.held_out:,} of them held out",
            ),
            ("v1", _model_line(self.v1)),
            ("v2", _model_line(self.v2)),
            ("promotion", f"{self.v2.version} {'promoted' if self.promoted else 'refused'}: {' '.join(self.reasons)}"),
            ("edge", f"serves {self.served}; {self.failed_requests} requests failed while it changed models"),
            ("target", self._target_line()),
            ("total", f"{self.seconds['total']:.1f} s"),
        ]

    def _target_line(self) -> str:
        if self.target is None:
            return f"none is set for {self.corpus}"
        if not self.official_test:
            return f"{self.target:.1%} test accuracy: not judged, for it is meant for the official test split"
        verdict = "reached" if self.target_reached else "NOT reached"
        return f"{self.target:.1%} test accuracy (MLPerf Training sentiment benchmark): {verdict}"


def _model_line(model: MeasuredModel) -> str:
    return (
        f"{model.version}: {model.test_accuracy:.2%} right on the test reviews, "
        f"{model.corrections_accuracy:.1%} on the held-out corrections"
    )
