"""The hook that `import torch` calls (entry point `torch.backends`): registers the pool device if there is a lease.

Without a lease in the environment it imports nothing and does nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from millpond.pool import wire

LEASE = "MILLPOND_POOL_LEASE"
"""Name of the lease that this process runs under; set by `millpond pool run`."""
WORKERS = "MILLPOND_POOL_WORKERS"
"""Addresses and tokens of the lease's workers, as JSON; set by `millpond pool run`."""


def autoload() -> None:
    """Register the pool device if the environment names a lease."""
    if not os.environ.get(LEASE):
        return
    from millpond.pool import device

    device.register(os.environ[LEASE], parse_workers(os.environ.get(WORKERS, "")))


def environment(lease: str, workers: list[wire.WorkerAddress]) -> dict[str, str]:
    """Return the variables that give a command a lease."""
    import msgspec

    return {LEASE: lease, WORKERS: msgspec.json.encode(workers).decode()}


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
