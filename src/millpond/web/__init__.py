"""The ground that hub and edge stand on: one Flask application shape, one look, one way to serve.

Promises: errors are JSON (or a page, for a browser) that say what to do next; nothing answers beyond loopback
without a token; no body grows past its limit. Knows nothing of models or corrections. `millpond.web.metrics`
is imported by the part itself, in its worker processes (see there).
"""

from millpond.web.access import Access
from millpond.web.application import create_app
from millpond.web.errors import ApiError
from millpond.web.json import json_response, read_json
from millpond.web.openapi import add_openapi, documented
from millpond.web.serving import serve

__all__ = ["Access", "ApiError", "add_openapi", "create_app", "documented", "json_response", "read_json", "serve"]
