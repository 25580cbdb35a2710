"""Millpond: a shared pool of GPU power, and the text models that it grinds out."""

from importlib.metadata import version

__version__ = version("millpond")


class MillpondError(Exception):
    """Base of every error meant for a person: what happened, what it means, what to do next.

    The command line prints its message and exits with 2; no traceback.
    """
