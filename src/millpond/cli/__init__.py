"""The `millpond` command: one module per part, imported only when that part is called.

`millpond edge` must start without torch, and `millpond --help` at once, so commands import what they
run inside their functions. A user's mistake prints one message and exits with 2; it never shows a traceback.
"""

from millpond.cli.main import main

__all__ = ["main"]
