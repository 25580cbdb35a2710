"""Ray on this machine alone, for as long as a `with` block: on loopback, with a token, and gone after it.

Nothing of it is left behind whatever ends the program, kill -9 included: a keeper sees to that. Other Ray clusters on
the machine are neither joined nor touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from millpond import MillpondError

OBJECT_STORE_BYTES = 128 * 1024**2
MAX_TEMPORARY_CHARACTERS = 30
"""Of the directory for temporary files: below it lie sockets, whose paths may have 107."""
KEEPER_END_S = 15.0

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: addresses are of loopback, not the machine's
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who takes no part of a GPU sees none
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
TOKEN = secrets.token_hex(32)
"""What this program's clusters ask for; Ray keeps the first one that it has seen for as long as the program runs."""


class RayError(MillpondError):
    """Ray is not installed, or does not start."""


@contextlib.contextmanager
def local_ray(*, cpus: int, gpus: int = 0) -> Iterator[Path]:
    """Start Ray with so many CPUs and GPUs to give out, and end it; yield a directory for what it writes.

    Raises:
        RayError: it is not installed, or does not start.
    """
    os.environ.update(ENVIRONMENT | {"RAY_AUTH_TOKEN": TOKEN})  # its import reads them
    os.environ.pop("RAY_ADDRESS", None)
    try:
        import ray
    except ImportError as error:
        raise RayError(
            f"this needs Ray, which is not installed ({error}). Install it: pip install 'millpond[ray]'."
        ) from error
    place = tempfile.gettempdir()
    if len(place) > MAX_TEMPORARY_CHARACTERS:
        place = "/tmp"  # noqa: S108  (mkdtemp makes a directory there that no one else can enter)
    directory = tempfile.mkdtemp(prefix="mp-", dir=place)
    keeper = subprocess.Popen(
        [sys.executable, "-m", "millpond.learn.keeper", directory], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        with _quiet():
            try:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    num_gpus=gpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=directory,
                )
            except (RuntimeError, OSError, ValueError, TimeoutError) as error:
                why = str(error).strip().partition("\n")[0] or type(error).__name__
                raise RayError(f"Ray does not start: {why}") from error
            try:
                yield Path(directory)
            finally:
                ray.shutdown()
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.wait(KEEPER_END_S)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's own log off the terminal: what counts is told by us."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.tune", "ray.air", "ray.train", "ray._private")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
