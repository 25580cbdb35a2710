"""The training site's service: models out, corrections in, and the loop that turns the one into the other."""

from millpond.hub.app import create_app, serve

__all__ = ["create_app", "serve"]
