"""Settings: one frozen dataclass per program, filled from `MILLPOND_*` variables.

`MILLPOND_<PROGRAM>_<FIELD>` sets a field; `MILLPOND_HOME` and `MILLPOND_DATA` are shared by all programs.
A secret `X` may also come from the file that `X_FILE` names. `millpond settings` prints every value and its
source, secrets masked; `docs/reference/settings.md` lists them, and a test keeps that list complete.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from millpond import MillpondError

T = TypeVar("T")


class SettingsError(MillpondError):
    """A setting cannot be used; the message names the variable, its value and what would be accepted."""


def _setting(help: str, *, default: Any = dataclasses.MISSING, secret: bool = False, shared: str = "") -> Any:
    """Declare a field: its help line, default, whether it is secret, and the variable if not the usual one."""
    return field(default=default, metadata={"help": help, "secret": secret, "variable": shared})


def default_home() -> Path:
    """Return where state lies unless `MILLPOND_HOME` says otherwise; an empty HOME is no obstacle."""
    base = os.environ.get("XDG_DATA_HOME") or (Path(os.environ.get("HOME") or "/tmp") / ".local/share")  # noqa: S108
    return Path(base) / "millpond"


def _home() -> Any:
    return field(
        default_factory=default_home,
        metadata={"help": "Where all state lies.", "secret": False, "variable": "MILLPOND_HOME"},
    )


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """`millpond pool serve` and `join`, and the address and token that clients use."""

    home: Path = _home()
    bind: str = _setting("Address the broker listens on; anything but loopback needs a token.", default="127.0.0.1")
    port: int = _setting("Port the broker listens on; 0 picks a free one.", default=7070)
    address: str = _setting("Where clients, and hosts that join, find the broker: host:port.", default="127.0.0.1:7070")
    token: str = _setting("Shared secret of broker, clients and hosts that join.", default="", secret=True)
    tls_cert: Path | None = _setting(
        "Certificate of this end (PEM, chain included); a broker that has one speaks TLS only.", default=None
    )
    tls_key: Path | None = _setting("Private key of that certificate (PEM, not encrypted).", default=None)
    tls_ca: Path | None = _setting(
        "Authorities (PEM) of the other end's certificate. A client, or a host that joins, speaks TLS only if it has "
        "one; a broker that has one asks its callers for a certificate.",
        default=None,
    )
    tls_name: str = _setting(
        "Name or address that the pool's certificates must carry; empty: that in MILLPOND_POOL_ADDRESS.", default=""
    )
    memory: str = _setting("Memory offered by a CPU device, such as 8GiB; empty: half of the host's.", default="")
    heartbeat_s: float = _setting("Seconds between a client's heartbeats.", default=2.0)
    grace_s: float = _setting("Seconds that a lease, with all it has on its workers, outlives silence.", default=30.0)
    ray_address: str = _setting(
        "Job server of the Ray on this host, such as http://127.0.0.1:8265; empty: this host runs no jobs.", default=""
    )
    ray_token: str = _setting("Token that this Ray asks for (its RAY_AUTH_TOKEN).", default="", secret=True)
    paddle_python: Path | None = _setting(
        "Python of an environment with Paddle, for jobs; default: the one that runs Millpond.", default=None
    )
    job_bytes: int = _setting("Bytes that the files of one job may take on this host.", default=20 * 1024**3)
    idle_limit_s: float = _setting("Seconds without any op after which a lease expires; 0: never.", default=0.0)
    confine: bool = _setting(
        "Whether this host's workers and jobs are kept from its files, programs and processes (Landlock): yes or no.",
        default=True,
    )


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """`millpond learn`."""

    home: Path = _home()
    data: Path | None = _setting(
        "Directory with corpora already on this machine.", default=None, shared="MILLPOND_DATA"
    )
    threads: int = _setting("Processor threads for training; 0: as many as there are cores.", default=0)
    prepared_bytes: int = _setting(
        "Bytes of prepared data sets kept in prepared/ under the home; those not used for longest go first.",
        default=20 * 1024**3,
    )
    database: str = _setting(
        "SQLAlchemy URL that a recipe's query goes to, where the recipe names none.", default="", secret=True
    )
    paddle_python: Path | None = _setting(
        "Python of an environment with Paddle, for --framework paddle; default: the one that runs Millpond.",
        default=None,
    )
    checkpoint_s: float = _setting(
        "Seconds between two checkpoints of a training, from which it resumes; 0: none.", default=30.0
    )


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    """`millpond registry`, and the keys that models are signed and verified with."""

    home: Path = _home()
    root: Path | None = _setting("Directory of the registry; default: registry/ under the home.", default=None)
    private_key: Path | None = _setting(
        "Key that signs models; default: keys/signing.key under the home.", default=None
    )
    public_key: Path | None = _setting(
        "Key that verifies models; default: keys/signing.pub under the home.", default=None
    )

    @property
    def root_path(self) -> Path:
        """Return the directory of the registry."""
        return self.root or self.home / "registry"

    @property
    def private_key_path(self) -> Path:
        """Return the path of the signing key."""
        return self.private_key or self.home / "keys/signing.key"

    @property
    def public_key_path(self) -> Path:
        """Return the path of the verifying key."""
        return self.public_key or self.home / "keys/signing.pub"


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """`millpond hub`."""

    home: Path = _home()
    bind: str = _setting("Address the hub listens on; anything but loopback needs tokens.", default="127.0.0.1")
    port: int = _setting("Port the hub listens on; 0 picks a free one.", default=7080)
    database: str = _setting("SQLAlchemy URL; empty: hub/hub.db under the home.", default="", secret=True)
    model: str = _setting("Name of the model that this hub looks after.", default="sentiment")
    recipe: Path | None = _setting("Recipe (TOML) that says what a training job trains on.", default=None)
    train_command: str = _setting(
        "Command of a training job; the job's directory is appended.", default="millpond learn job"
    )
    retrain_after: int = _setting("Accepted corrections that start a retraining; 0: only by hand.", default=200)
    job_timeout_s: float = _setting("Seconds after which a training job is stopped.", default=7200.0)
    job_attempts: int = _setting("Times a failed training job is tried in all.", default=3)
    edge_token: str = _setting("Token of the edges: pull models, send corrections.", default="", secret=True)
    reviewer_token: str = _setting("Token of the reviewers: judge corrections.", default="", secret=True)
    operator_token: str = _setting("Token of the operators: everything.", default="", secret=True)
    max_request_bytes: int = _setting("Largest request body, in bytes.", default=8 * 1024 * 1024)


@dataclass(frozen=True, kw_only=True)
class EdgeSettings:
    """`millpond edge`."""

    home: Path = _home()
    name: str = _setting("Name of this edge at the hub; empty: the host's name.", default="")
    bind: str = _setting("Address the edge listens on; anything but loopback needs a token.", default="127.0.0.1")
    port: int = _setting("Port the edge listens on; 0 picks a free one.", default=7090)
    workers: int = _setting("Web worker processes.", default=2)
    token: str = _setting(
        "Token that callers of this edge must give; empty: none (loopback only).", default="", secret=True
    )
    hub: str = _setting("URL of the hub; empty: serve what is here, keep corrections.", default="")
    hub_token: str = _setting("Token that this edge gives the hub.", default="", secret=True)
    model: str = _setting("Name of the model to serve.", default="sentiment")
    tag: str = _setting("Tag to follow.", default="champion")
    public_key: Path | None = _setting(
        "Key that verifies models; default: keys/signing.pub under the home.", default=None
    )
    sync_s: float = _setting("Seconds between looks at the hub.", default=5.0)
    keep_versions: int = _setting("Model versions kept on disk, the served one included.", default=3)
    threads: int = _setting("Inference threads per worker.", default=1)
    max_texts: int = _setting("Most texts in one request.", default=256)
    max_text_bytes: int = _setting("Longest single text, in bytes of UTF-8.", default=1024 * 1024)
    max_request_bytes: int = _setting("Largest request body, in bytes.", default=4 * 1024 * 1024)
    keep_predictions: int = _setting("Predictions remembered so that feedback may name them.", default=100_000)
    max_outbox: int = _setting("Most corrections waiting for the hub; more are refused with 507.", default=1_000_000)

    @property
    def public_key_path(self) -> Path:
        """Return the path of the verifying key."""
        return self.public_key or self.home / "keys/signing.pub"


PROGRAMS: dict[str, type] = {
    "pool": PoolSettings,
    "learn": LearnSettings,
    "registry": RegistrySettings,
    "hub": HubSettings,
    "edge": EdgeSettings,
}


def variable_of(program: str, setting: dataclasses.Field[Any]) -> str:
    """Return the environment variable of a field."""
    return str(setting.metadata["variable"]) or f"MILLPOND_{program}_{setting.name}".upper()


def load(settings_class: type[T], environ: Mapping[str, str] | None = None, **overrides: Any) -> T:
    """Fill a settings dataclass from the environment; `overrides` that are not None win.

    Raises:
        SettingsError: a variable cannot be read as its field's type, or a secret's file cannot be read.
    """
    environ = os.environ if environ is None else environ
    program = next(name for name, known in PROGRAMS.items() if known is settings_class)
    hints = typing.get_type_hints(settings_class)
    values: dict[str, Any] = {}
    for setting in dataclasses.fields(settings_class):  # type: ignore[arg-type]
        if overrides.get(setting.name) is not None:
            values[setting.name] = overrides[setting.name]
            continue
        variable = variable_of(program, setting)
        text = environ.get(variable, "")
        if not text and setting.metadata["secret"] and environ.get(f"{variable}_FILE"):
            text = _read_secret(variable, Path(environ[f"{variable}_FILE"]))
        if text:
            values[setting.name] = _parse(variable, text, hints[setting.name], bool(setting.metadata["secret"]))
    return settings_class(**values)


def describe(program: str, environ: Mapping[str, str] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (variable, value with secrets masked, where it came from, help) for each field of a program."""
    environ = os.environ if environ is None else environ
    settings_class = PROGRAMS[program]
    loaded: Any = load(settings_class, environ)
    for setting in dataclasses.fields(settings_class):
        variable = variable_of(program, setting)
        value = getattr(loaded, setting.name)
        secret = setting.metadata["secret"]
        shown = ("(set)" if value else "(not set)") if secret else "" if value is None else str(value)
        shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else shown
        source = "environment" if environ.get(variable) else "default"
        if source == "default" and secret and environ.get(f"{variable}_FILE"):
            source = "file"
        yield variable, shown, source, setting.metadata["help"]


def is_loopback(bind: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    if bind == "localhost":
        return True
    try:
        return ipaddress.ip_address(bind).is_loopback
    except ValueError:
        return False


def check_exposure(program: str, bind: str, **tokens: str) -> None:
    """Refuse to listen beyond loopback without every one of `tokens` (variable suffix → value).

    Raises:
        SettingsError: the bind address is not loopback and a token is missing.
    """
    if is_loopback(bind):
        return
    missing = [f"MILLPOND_{program}_{name}".upper() for name, value in tokens.items() if not value]
    if missing:
        raise SettingsError(
            f"millpond {program} will not listen on {bind}: anyone who reaches that address could use it. "
            f"Set {', '.join(missing)} (or {missing[0]}_FILE), or bind 127.0.0.1."
        )


def _read_secret(variable: str, path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{variable}_FILE names {path}, which cannot be read: {error}") from error


def _parse(variable: str, text: str, hint: Any, secret: bool) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    try:
        if hint is bool:
            return ("no", "yes").index(text) == 1
        return Path(text).expanduser() if hint is Path else hint(text)
    except (ValueError, RuntimeError):
        shown = "its value" if secret else repr(text)
        wanted = {int: "a whole number", float: "a number of seconds", bool: "yes or no"}.get(hint, "a path")
        raise SettingsError(f"{variable} is {shown}, which is not {wanted}. Correct it, or unset it.") from None
