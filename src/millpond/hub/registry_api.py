"""Models for edges: the pull half of the OCI distribution specification 1.1, read only, with its own errors.

Any OCI client pulls from it (log in with any user name and a token as the password).
"""

from __future__ import annotations

import flask
from flask.typing import ResponseReturnValue

from millpond.hub.state import Hub
from millpond.registry import RegistryError
from millpond.registry.manifest import MANIFEST_TYPE
from millpond.web import Access, ApiError, documented, json_response

MAX_TAGS = 1000
IMMUTABLE = "private, max-age=31536000, immutable"
_CODES = {401: "UNAUTHORIZED", 403: "DENIED", 405: "UNSUPPORTED"}


class OciError(Exception):
    """An error as the OCI specification spells it."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status = status
        self.code = code


def blueprint(hub: Hub, access: Access) -> flask.Blueprint:
    """Return the addresses below `/v2/`."""
    api = flask.Blueprint("registry", __name__, url_prefix="/v2")

    @api.errorhandler(OciError)
    def oci_error(error: OciError) -> flask.Response:
        return _errors(error.status, error.code, str(error))

    @api.errorhandler(ApiError)
    def api_error(error: ApiError) -> flask.Response:
        response = _errors(error.status, _CODES.get(error.status, "DENIED"), str(error))
        if error.status == 401:
            response.headers["WWW-Authenticate"] = 'Basic realm="millpond hub"'
        return response

    @api.get("/")
    @documented()
    @access.required("edge")
    def ping() -> ResponseReturnValue:
        """Say that this is an OCI registry."""
        return json_response({}, headers={"Docker-Distribution-API-Version": "registry/2.0"})

    @api.get("/<name>/tags/list")
    @documented(errors={404: "No such model."})
    @access.required("edge")
    def tags(name: str) -> ResponseReturnValue:
        """Return the tags of a model, in order; `n` and `last` page through them."""
        limit = flask.request.args.get("n", MAX_TAGS, type=int)
        after = flask.request.args.get("last", "")
        try:
            left = sorted(tag for tag in hub.store.tags(name) if tag > after)
        except RegistryError as error:
            raise OciError(404, "NAME_UNKNOWN", str(error)) from None
        shown = left[: max(0, min(limit, MAX_TAGS))]
        headers = {}
        if shown and len(left) > len(shown):
            headers["Link"] = f'</v2/{name}/tags/list?n={len(shown)}&last={shown[-1]}>; rel="next"'
        return json_response({"name": name, "tags": shown}, headers=headers)

    @api.get("/<name>/manifests/<reference>")
    @documented(errors={404: "No such model, tag or digest."})
    @access.required("edge")
    def manifest(name: str, reference: str) -> ResponseReturnValue:
        """Return the manifest that a tag or a digest names."""
        try:
            digest = hub.store.resolve(f"{name}{'@' if ':' in reference else ':'}{reference}")
            raw = hub.store.manifest_bytes(name, digest)
        except RegistryError as error:
            raise OciError(404, "MANIFEST_UNKNOWN", str(error)) from None
        response = flask.Response(raw, mimetype=MANIFEST_TYPE)
        response.headers["Docker-Content-Digest"] = digest
        response.headers["Cache-Control"] = IMMUTABLE if reference == digest else "private, no-cache"
        response.set_etag(digest)
        return response.make_conditional(flask.request)

    @api.get("/<name>/blobs/<digest>")
    @documented(errors={404: "No such blob.", 416: "No such range."})
    @access.required("edge")
    def blob(name: str, digest: str) -> ResponseReturnValue:
        """Return a blob, or the range of it that is asked for."""
        try:
            path = hub.store.blob_path(name, digest)
            response = flask.send_file(path, "application/octet-stream", etag=digest, last_modified=None)
        except (RegistryError, FileNotFoundError) as error:
            raise OciError(404, "BLOB_UNKNOWN", str(error)) from None
        response.headers["Docker-Content-Digest"] = digest
        response.headers["Cache-Control"] = IMMUTABLE
        return response

    @api.route("/<path:rest>", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    @access.required("edge")
    def other(rest: str) -> ResponseReturnValue:
        """Refuse what else the specification has: pushing, deleting, names with a slash."""
        if flask.request.method not in ("GET", "HEAD"):
            raise OciError(405, "UNSUPPORTED", "This registry is read only; training pushes models.")
        raise OciError(404, "NAME_UNKNOWN", "There is nothing at this address.")

    return api


def _errors(status: int, code: str, message: str) -> flask.Response:
    return json_response({"errors": [{"code": code, "message": message}]}, status)
