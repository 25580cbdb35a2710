"""Texts of others on a terminal."""

from __future__ import annotations


def plain(text: str) -> str:
    """Return a text without what would move a terminal's cursor or turn its direction."""
    return "".join(character if character.isprintable() else " " for character in text)
