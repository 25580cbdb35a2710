"""The hook that `import torch` calls (entry point `torch.backends`): registers the pool device if there is a lease.

Without a lease in the environment it imports nothing and does nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from millpond.pool import wire

LEASE = "MILLPOND_POOL_LEASE"
"""Name of the lease that this process runs under; set by `millpond pool run`."""
WORKERS = "MILLPOND_POOL_WORKERS"
"""Addresses and tokens of the lease's workers, as JSON; set by `millpond pool run`."""
ENDED = "MILLPOND_POOL_ENDED"
"""Path of a file that says why the lease has ended, once it has; set by `millpond pool run`."""


def autoload() -> None:
    """Register the pool device if the environment names a lease."""
    if not os.environ.get(LEASE):
        return
    from millpond.pool import device

    device.register(os.environ[LEASE], parse_workers(os.environ.get(WORKERS, "")))


def environment(lease: str, workers: list[wire.WorkerAddress], ended: Path | None = None) -> dict[str, str]:
    """Return the variables that give a command a lease."""
    import msgspec

    variables = {LEASE: lease, WORKERS: msgspec.json.encode(workers).decode()}
    return variables if ended is None else {**variables, ENDED: str(ended)}


def why_ended() -> str:
    """Return why this process's lease has ended; nothing while it stands, or as far as is known."""
    try:
        return Path(os.environ[ENDED]).read_text()[:1000]
    except (KeyError, OSError, UnicodeDecodeError):
        return ""


def parse_workers(text: str) -> list[wire.WorkerAddress]:
    """Return the workers that the environment names.

    Raises:
        LeaseError: the text is not what `millpond pool run` sets.
    """
    import msgspec

    from millpond.pool import wire
    from millpond.pool.errors import LeaseError

    try:
        return msgspec.json.decode(text, type=list[wire.WorkerAddress])
    except msgspec.DecodeError as error:
        raise LeaseError(f"{WORKERS} is not what millpond pool run sets: {error}. Unset {LEASE}.") from None
