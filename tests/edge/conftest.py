"""A training site, a hub stand-in, and an edge: in this process (`app`), or as an operator starts it (`edge`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from edge_site import EdgeProcess, Site, StandInHub
from millpond.edge.app import Edge, create_edge
from millpond.edge.hub_client import HubClient
from millpond.edge.models import ModelShelf
from millpond.edge.state import EdgeFiles, StateFile
from millpond.edge.sync import ModelSync
from millpond.settings import EdgeSettings


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "site").mkdir()
    return Site(tmp_path / "site")


@pytest.fixture
def hub(site: Site) -> Iterator[StandInHub]:
    hub = StandInHub(site.store)
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def settings(tmp_path: Path, site: Site, hub: StandInHub) -> EdgeSettings:
    return EdgeSettings(
        home=tmp_path / "edge-home", name="edge-1", hub=hub.url, public_key=site.public_key, sync_s=0.05,
        max_texts=8, max_text_bytes=2000, max_request_bytes=100_000,
    )  # fmt: skip


class Puller:
    """`ModelSync` with its files, driven step by step."""

    def __init__(self, settings: EdgeSettings) -> None:
        self.files = EdgeFiles(settings.home)
        self.shelf = ModelShelf(self.files.models)
        self.state = StateFile(self.files.sync)
        self.client = HubClient(settings.hub, settings.hub_token)
        self.sync = ModelSync(settings, self.client, self.shelf, self.state)

    def step(self) -> str | None:
        """Look at the hub once; return the digest that is current then."""
        self.sync.step()
        current = self.shelf.current()
        return current.serving if current else None


@pytest.fixture
def make_puller() -> Iterator[Callable[[EdgeSettings], Puller]]:
    made = []

    def make(settings: EdgeSettings) -> Puller:
        made.append(Puller(settings))
        return made[-1]

    yield make
    for puller in made:
        puller.client.close()


@pytest.fixture
def puller(settings: EdgeSettings, make_puller: Callable[[EdgeSettings], Puller]) -> Puller:
    return make_puller(settings)


@pytest.fixture
def make_app() -> Iterator[Callable[[EdgeSettings], tuple[FlaskClient, Edge]]]:
    edges = []

    def make(settings: EdgeSettings) -> tuple[FlaskClient, Edge]:
        app = create_edge(settings)
        edges.append(app.extensions["millpond.edge"])
        return app.test_client(), edges[-1]

    yield make
    for edge in edges:
        edge.close()


@pytest.fixture
def make_edge(tmp_path: Path, site: Site, hub: StandInHub) -> Iterator[Callable[..., EdgeProcess]]:
    """Return a function that starts a real edge; its home stays the same from call to call."""
    started = []

    def make(**settings: Any) -> EdgeProcess:
        given = {"hub": hub.url, "name": "edge-1"} | settings
        edge = EdgeProcess(tmp_path / "edge-home", public_key=site.public_key, **given)
        started.append(edge)
        edge.start()
        return edge

    yield make
    for edge in started:
        edge.http.close()  # first: open connections would be waited for
        edge.stop()
