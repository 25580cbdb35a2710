"""The reference page of the edge's HTTP interface names all that there is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from flask.testing import FlaskClient

from millpond.edge.answers import FeedbackAnswer, FeedbackRequest, ModelAnswer, PredictionAnswer, SyncAnswer
from millpond.edge.app import Edge
from millpond.settings import EdgeSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/http-edge.md").read_text()


def test_every_address_error_field_and_metric_is_on_the_page(
    make_app: Callable[[EdgeSettings], tuple[FlaskClient, Edge]], settings: EdgeSettings
) -> None:
    client, _ = make_app(settings)
    document = client.get("/openapi.json").json
    assert document is not None
    addresses = {f"`{method.upper()} {path}`" for path, methods in document["paths"].items() for method in methods} - {
        "`GET /healthz`"
    }  # of every service: http.md
    sources = [(ROOT / "src/millpond/edge" / name).read_text() for name in ("app.py", "sync.py", "engine.py")]
    codes = set(re.findall(r"ApiError\(\s*\d+,\s*\"(\w+)\"", sources[0]))
    refusals = {code for source in sources[1:] for code in re.findall(r"ModelUnfit\(\s*\"(\w+)\"", source)}
    refusals |= set(re.findall(r"_refuse\(digest, \w*\"?\"?, \"(\w+)\"", sources[1]))
    metrics = {
        line.split()[2]
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("# TYPE millpond_") and not line.split()[2].endswith("_created")
    }
    structs = (FeedbackAnswer, FeedbackRequest, ModelAnswer, PredictionAnswer, SyncAnswer)
    fields = {f'"{field}"' for struct in structs for field in struct.__struct_fields__}
    assert len(codes) >= 9
    assert refusals >= {"manifest", "digest", "signature", "config", "labels", "golden", "engine"}
    assert len(metrics) >= 10
    wanted = addresses | fields | {f"`{code}`" for code in codes | refusals} | {f"`{name}`" for name in metrics}
    assert sorted(name for name in wanted if name not in PAGE) == []
