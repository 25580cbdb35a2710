"""What a worker writes to stderr, on its way into its host's log: bounded, and without control characters. Pure.

Hostile clients can make a worker say a line for each of their connections, and a worker that runs their code anything.
"""

from __future__ import annotations

BURST_BYTES = 64 * 1024
"""What a worker may write at once."""
BYTES_PER_S = 1024
"""What it may write on and on; more is left out, and how much is said."""
KEPT_BYTES = 4096
"""How much of its end is kept, to tell why the worker ended."""


class WorkerLog:
    """The log of one worker. Time is in seconds, of any clock that does not go back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._end = bytearray()
        self._allowance = float(BURST_BYTES)
        self._at = 0.0
        self._left_out = 0

    def add(self, chunk: bytes, now: float) -> str:
        """Take in what the worker wrote; return what of it the host's log takes."""
        self._end += chunk
        del self._end[:-KEPT_BYTES]
        self._allowance = min(self._allowance + (now - self._at) * BYTES_PER_S, float(BURST_BYTES))
        self._at = now
        if len(chunk) > self._allowance:
            self._left_out += len(chunk)
            return ""
        self._allowance -= len(chunk)
        return self.rest() + _shown(chunk)

    def rest(self) -> str:
        """Return a line that says how much was left out since the last one, if anything was."""
        left_out, self._left_out = self._left_out, 0
        return f"worker {self.name}: left out {left_out} bytes of its log\n" if left_out else ""

    def last_line(self) -> str:
        """Return the last line that the worker wrote; empty, if it wrote none."""
        return next(iter(_shown(bytes(self._end)).strip().splitlines()[-1:]), "")


def _shown(text: bytes) -> str:
    """Return text that neither moves a terminal's cursor nor passes for a line of another's."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else f"\\x{ord(character):02x}"
        for character in text.decode(errors="replace")
    )
