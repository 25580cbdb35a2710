"""Who may call what: bearer tokens with ordered roles, a login cookie for pages, same-origin writes.

Without any token configured everybody is allowed everything, and `serve` then listens on loopback only; such a
service answers to loopback host names alone, so that a web site cannot reach it by rebinding its own name.
The cookie holds no token: it is the role and an expiry, authenticated by HMAC under that role's token.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from typing import ParamSpec
from urllib.parse import urlsplit

import flask
from flask.typing import ResponseReturnValue

from millpond.settings import is_loopback
from millpond.web.errors import ApiError

P = ParamSpec("P")
View = Callable[P, ResponseReturnValue]

LOGIN_S = 12 * 3600
"""How long a page stays logged in."""
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}


class Access:
    """The roles of one service, lowest first, each with its token ("" where not configured)."""

    def __init__(self, program: str, tokens: Mapping[str, str]):
        self.program = program
        self._tokens = dict(tokens)
        self._rank = {role: rank for rank, role in enumerate(tokens)}
        self._highest = list(tokens)[-1]
        self._cookie = f"millpond_{program}"  # cookies are shared by all ports of a host

    @property
    def is_open(self) -> bool:
        """Return whether no token is configured at all."""
        return not any(self._tokens.values())

    def required(self, role: str, *, page: bool = False) -> Callable[[View[P]], View[P]]:
        """Guard a view: the caller must have `role` or a higher one; a `page` sends people to the login instead."""

        def decorate(view: View[P]) -> View[P]:
            @functools.wraps(view)
            def guarded(*args: P.args, **kwargs: P.kwargs) -> ResponseReturnValue:
                has = self.role()
                if has is None and page:
                    return flask.redirect(flask.url_for("web.login", next=flask.request.full_path.rstrip("?")))
                if has is None:
                    raise ApiError(
                        401,
                        "token_required",
                        "This address needs a token, and the request has none that is known here.",
                        "Send the header Authorization: Bearer TOKEN, or log in at /login.",
                        {"WWW-Authenticate": f'Bearer realm="millpond {self.program}"'},
                    )
                if self._rank[has] < self._rank[role]:
                    raise ApiError(
                        403,
                        "role_too_low",
                        f"This needs the role {role}; the token given is that of {has}.",
                        f"Use the token of the role {role}.",
                    )
                return view(*args, **kwargs)

            return guarded

        return decorate

    def role(self) -> str | None:
        """Return the current request's role, or None."""
        if self.is_open:
            return self._highest
        scheme, _, token = flask.request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":  # what OCI clients send
            return self.role_of(_password(token.strip()))
        if scheme:
            return self.role_of(token.strip()) if scheme.lower() == "bearer" else None
        return self._cookie_role(flask.request.cookies.get(self._cookie, ""))

    def role_of(self, token: str) -> str | None:
        """Return the role of a token, in time that does not depend on how much of it is right."""
        found = None
        for role, known in self._tokens.items():
            if known and hmac.compare_digest(known.encode(), token.encode(errors="surrogateescape")):
                found = role
        return found

    def log_in(self, response: flask.Response, role: str) -> None:
        """Give the browser a cookie for `role`."""
        expires = int(time.time()) + LOGIN_S
        value = f"{role}.{expires}.{self._mac(role, expires)}"
        response.set_cookie(
            self._cookie, value, max_age=LOGIN_S, httponly=True, samesite="Strict", secure=flask.request.is_secure
        )

    def log_out(self, response: flask.Response) -> None:
        """Take the cookie back."""
        response.delete_cookie(self._cookie, httponly=True, samesite="Strict")

    def refuse_other_sites(self) -> None:
        """Refuse what another web site made the browser send.

        Fetch metadata where the browser sends it, else Origin against Host: the check of Go's
        `net/http.CrossOriginProtection`. With the cookie's SameSite=Strict it needs no token in forms.
        """
        request = flask.request
        if self.is_open and not is_loopback(_hostname(request.host)):
            raise ApiError(
                403,
                "host_not_allowed",
                f"This service is open to this machine only, not as {request.host[:100]!r}.",
                "Use http://127.0.0.1 with its port, or configure a token.",
            )
        if request.method in SAFE_METHODS:
            return
        site = request.headers.get("Sec-Fetch-Site")
        origin = request.headers.get("Origin")
        if site in ("same-origin", "none"):
            return
        if site is None and (origin is None or urlsplit(origin).netloc == request.host):
            return
        raise ApiError(
            403, "cross_origin", "Another web site made this request.", "Use this service's own page, or a program."
        )

    def _cookie_role(self, value: str) -> str | None:
        role, _, rest = value.partition(".")
        expires, _, mac = rest.partition(".")
        if not self._tokens.get(role) or not expires.isdecimal() or not expires.isascii() or len(expires) > 12:
            return None
        if not hmac.compare_digest(self._mac(role, int(expires)).encode(), mac.encode(errors="replace")):
            return None
        return role if int(expires) > time.time() else None

    def _mac(self, role: str, expires: int) -> str:
        message = f"millpond {self.program} login {role} {expires}"
        return hmac.new(self._tokens[role].encode(), message.encode(), hashlib.sha256).hexdigest()


def _password(encoded: str) -> str:
    """Return the password of Basic authentication, "" where it is none; the user's name is free to choose."""
    try:  # not werkzeug's parser: it fails on what is not ASCII (3.1)
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    return urlsplit(f"//{host}").hostname or "" if host.count("]") <= 1 else ""
