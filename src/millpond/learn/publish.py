"""From an unsigned model directory to a signed model in the registry, under its next version."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from millpond.learn.export import ExportError
from millpond.registry import PushedModel, Store, generate_key_pair, parse_config, sign
from millpond.settings import RegistrySettings


def publish(directory: Path, settings: RegistrySettings, *, name: str | None, tags: Sequence[str]) -> PushedModel:
    """Sign a copy of `directory` as the next version of `name` and push it; without keys, a pair is made.

    Raises:
        ExportError: it is no model directory.
        RegistryError: the key cannot be used, or the registry refuses it.
    """
    if not (directory / "config.json").is_file():
        raise ExportError(f"{directory} holds no model. Give the directory of a run, or of a model.")
    store = Store(settings.root_path)
    private, public = settings.private_key_path, settings.public_key_path
    if not private.exists() and not public.exists():
        generate_key_pair(private, public)
    with tempfile.TemporaryDirectory(prefix="millpond-publish-") as temporary:
        copy = Path(shutil.copytree(directory, Path(temporary) / "model"))
        config = parse_config((copy / "config.json").read_bytes())
        name = name or config.name
        config = msgspec.structs.replace(config, name=name, version=store.next_version(name))
        (copy / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
        sign(copy, private)
        return store.push(copy, tags=tags)
