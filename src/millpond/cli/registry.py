"""`millpond registry`: the signed, versioned models of this site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from millpond import settings

if TYPE_CHECKING:
    from millpond.registry import Store

app = typer.Typer(no_args_is_help=True)

REFERENCE = typer.Argument(help="name, name:tag or name@sha256:…; a bare name is its champion.")
ROOT = typer.Option(None, "--root", help="Directory of the registry.")
JSON = typer.Option(False, "--json", help="Machine output.")


@app.command("list")
def list_models(
    name: str = typer.Argument("", help="Only models of this name."),
    root: Path | None = ROOT,
    as_json: bool = JSON,
) -> None:
    """List models, newest version first."""
    store = _store(root)
    models = [model for known in ([name] if name else store.names()) for model in store.list(known)]
    if as_json:
        _print_json(models)
        return
    if not models:
        typer.echo(f"No models in {store.root} yet. Train one with millpond learn train, push it with learn export.")
        return
    table = Table("model", "version", "tags", "test accuracy", "created", "digest")
    for model in models:
        accuracy = model.metrics.get("test_accuracy")
        tags = ", ".join(tag for tag in model.tags if tag != model.version)
        shown = "" if accuracy is None else f"{accuracy:.2%}"
        table.add_row(model.name, model.version, tags, shown, model.created, model.digest[:19])
    Console().print(table)


@app.command()
def show(reference: str = REFERENCE, root: Path | None = ROOT, as_json: bool = JSON) -> None:
    """Show one model: its config, its files, its tags."""
    from millpond.registry import parse_config, parse_manifest, split_reference

    store, name = _store(root), split_reference(reference)[0]
    model = store.describe(name, store.resolve(reference))
    files = parse_manifest(store.manifest_bytes(name, model.digest)).files()
    config = parse_config(store.blob_path(name, files["config.json"].digest).read_bytes())
    if as_json:
        _print_json({"model": model, "config": config, "files": files})
        return
    table = Table(f"{name} {model.version}", model.digest, show_lines=False)
    table.add_row("tags", ", ".join(model.tags))
    for field, value in msgspec.to_builtins(config).items():
        table.add_row(field, msgspec.json.encode(value).decode() if isinstance(value, dict | list) else str(value))
    for file_name, descriptor in files.items():
        table.add_row(file_name, f"{descriptor.size:,} bytes, {descriptor.digest}")
    Console().print(table)


@app.command()
def verify(
    reference: str = REFERENCE,
    root: Path | None = ROOT,
    public_key: Path | None = typer.Option(None, "--public-key", help="Key to verify with."),
    as_json: bool = JSON,
) -> None:
    """Hash every file of a model anew and check its signature."""
    import tempfile

    from millpond.registry import split_reference
    from millpond.registry import verify as verify_signature

    store, name = _store(root), split_reference(reference)[0]
    digest = store.resolve(reference)
    key = settings.load(settings.RegistrySettings, public_key=public_key).public_key_path
    with tempfile.TemporaryDirectory(prefix="millpond-verify-") as directory:
        verify_signature(store.checkout(name, digest, Path(directory) / "model"), key)
    if as_json:
        _print_json({"name": name, "digest": digest, "verified": True, "public_key": str(key)})
    else:
        typer.echo(f"{name} {digest} is whole, and was signed by the holder of the key to {key}.")


@app.command()
def tag(
    reference: str = REFERENCE,
    tag: str = typer.Argument(help="The tag that shall name this model from now on."),
    root: Path | None = ROOT,
    as_json: bool = JSON,
) -> None:
    """Let a tag name a model; it no longer names another one."""
    from millpond.registry import split_reference

    store, name = _store(root), split_reference(reference)[0]
    digest = store.resolve(reference)
    store.tag(name, digest, tag)
    if as_json:
        _print_json({"name": name, "digest": digest, "tag": tag})
    else:
        typer.echo(f"{name}:{tag} is {digest} now.")


@app.command()
def keygen(
    private_key: Path | None = typer.Option(None, "--private-key", help="Where to write the key that signs."),
    public_key: Path | None = typer.Option(None, "--public-key", help="Where to write the key that verifies."),
    as_json: bool = JSON,
) -> None:
    """Make the pair of keys that models are signed and verified with."""
    from millpond.registry import generate_key_pair

    loaded = settings.load(settings.RegistrySettings, private_key=private_key, public_key=public_key)
    generate_key_pair(loaded.private_key_path, loaded.public_key_path)
    if as_json:
        _print_json({"private_key": str(loaded.private_key_path), "public_key": str(loaded.public_key_path)})
    else:
        typer.echo(f"The key that signs is {loaded.private_key_path}: it stays here, readable by you alone.")
        typer.echo(f"The key that verifies is {loaded.public_key_path}: copy it to every edge.")


def _store(root: Path | None) -> Store:
    from millpond.registry import Store

    return Store(settings.load(settings.RegistrySettings, root=root).root_path)


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
