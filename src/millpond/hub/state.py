"""What every part of the hub works on: its settings, its database, its registry; and the champion."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import msgspec

from millpond.hub.db import Database, default_url
from millpond.registry import ModelNotFound, PushedModel, Store
from millpond.schema import ModelRef
from millpond.settings import HubSettings, RegistrySettings

CHAMPION = "champion"
CANDIDATE = "candidate"


@dataclass(frozen=True)
class Hub:
    """Opened once in each process; the database's connections are not shared between processes."""

    settings: HubSettings
    registry: RegistrySettings
    database: Database
    store: Store

    @classmethod
    def open(cls, settings: HubSettings, registry: RegistrySettings) -> Hub:
        """Return a hub on the state that the settings name; makes nothing."""
        database = Database(settings.database or default_url(settings.home))
        return cls(settings, registry, database, Store(registry.root_path))

    @property
    def home(self) -> Path:
        """Return the directory of the hub's own state."""
        return self.settings.home.absolute() / "hub"

    def champion(self) -> PushedModel | None:
        """Return the model that edges follow, as the registry tags it; None before the first."""
        tags = self.tags()
        return self._tagged(tags[CHAMPION], tags) if CHAMPION in tags else None

    def champion_ref(self) -> ModelRef | None:
        """Return the champion as an edge names it."""
        champion = self.champion()
        return ModelRef(name=champion.name, version=champion.version, digest=champion.digest) if champion else None

    def labels(self) -> list[str] | None:
        """Return the labels of the champion; None before the first, when any label may be right."""
        champion = self.champion()
        return champion.labels if champion else None

    def tags(self) -> dict[str, str]:
        """Return tag → digest of the hub's model; empty before the first."""
        try:
            return self.store.tags(self.settings.model)
        except ModelNotFound:
            return {}

    def models(self) -> list[PushedModel]:
        """Return all versions of the hub's model, newest first."""
        tags = self.tags()
        found = [self._tagged(digest, tags) for digest in dict.fromkeys(tags.values())]
        return sorted(found, key=lambda model: int(model.version[1:]), reverse=True)

    def describe(self, digest: str) -> PushedModel:
        """Return what never changes about a model: all but its tags."""
        return _describe(self.store.root, self.settings.model, digest)

    def _tagged(self, digest: str, tags: dict[str, str]) -> PushedModel:
        return msgspec.structs.replace(self.describe(digest), tags=sorted(tag for tag in tags if tags[tag] == digest))

    def why_no_training(self) -> str | None:
        """Return why a training job cannot be started here, and what to do; None if it can."""
        recipe, keys = self.settings.recipe, (self.registry.private_key_path, self.registry.public_key_path)
        if recipe is None:
            return (
                "No recipe says what to train on. Set MILLPOND_HUB_RECIPE to a recipe (TOML), and start the hub again."
            )
        if not recipe.is_file():
            return f"The recipe {recipe} is not there. Put it there, or set MILLPOND_HUB_RECIPE."
        if missing := [str(key) for key in keys if not key.is_file()]:
            return f"There is no key to sign and verify models with ({missing[0]}). Make one: millpond registry keygen"
        return None


@functools.lru_cache(maxsize=256)
def _describe(root: Path, name: str, digest: str) -> PushedModel:
    return msgspec.structs.replace(Store(root).describe(name, digest), tags=[])
