"""The handshake: both ends prove that they know the token, and that they fit. Pure.

Challenge–response with HMAC-SHA-256 over both nonces, so that the token never crosses the wire and a recorded
greeting is worth nothing. Over TLS the proofs are also bound to the listener's certificate (`channel`), so that who
has another one, or takes TLS off on the way, cannot pass them on. It authenticates; it does not encrypt.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from millpond.pool import wire
from millpond.pool.errors import AuthenticationError, HandshakeError, VersionMismatch

MIN_TORCH = (2, 11)
"""Oldest torch that either end may have; within one major version, newer and older work together."""


def challenge() -> wire.Challenge:
    """Return a listener's opening."""
    return wire.Challenge(wire.PROTOCOL, secrets.token_bytes(32))


def answer(opening: wire.Challenge, token: str, torch: str, name: str = "", *, channel: bytes = b"") -> wire.Hello:
    """Return a caller's answer to `opening`.

    Raises:
        VersionMismatch: the listener speaks another protocol.
    """
    check_protocol(opening.protocol, "the other end")
    nonce = secrets.token_bytes(32)
    return wire.Hello(wire.PROTOCOL, torch, nonce, _proof(token, "caller", channel, opening.nonce, nonce), name)


def admit(
    opening: wire.Challenge,
    hello: wire.Hello,
    token: str,
    torch: str,
    *,
    device: str = "",
    memory_bytes: int = 0,
    grace_s: float = 0.0,
    channel: bytes = b"",
) -> wire.Welcome:
    """Return the listener's welcome to a caller that proved itself and fits.

    Raises:
        VersionMismatch: its protocol or torch does not fit.
        AuthenticationError: it does not know the token.
    """
    check_protocol(hello.protocol, "the client")
    if not hmac.compare_digest(hello.proof, _proof(token, "caller", channel, opening.nonce, hello.nonce)):
        raise AuthenticationError(
            "the token is wrong. Set MILLPOND_POOL_TOKEN (or MILLPOND_POOL_TOKEN_FILE) to the pool's token."
        )
    check_torch(hello.torch, "the client", torch, "the pool")
    proof = _proof(token, "listener", channel, opening.nonce, hello.nonce)
    return wire.Welcome(torch, proof, device, memory_bytes, grace_s)


def confirm(
    opening: wire.Challenge, hello: wire.Hello, reply: wire.Message, token: str, *, channel: bytes = b""
) -> wire.Welcome:
    """Return the welcome, if the listener too knows the token.

    Raises:
        HandshakeError: it refused, or could not prove itself.
    """
    if isinstance(reply, wire.Refused):
        if reply.code == "protocol" or reply.code == "torch":
            raise VersionMismatch(reply.code, reply.message)
        raise (AuthenticationError if reply.code == "token" else HandshakeError)(reply.message)
    if not isinstance(reply, wire.Welcome):
        raise HandshakeError("the other end did not answer the greeting as a pool does; is the address right?")
    if not hmac.compare_digest(reply.proof, _proof(token, "listener", channel, opening.nonce, hello.nonce)):
        raise AuthenticationError("the other end does not know the token: it is not the pool. Check the address.")
    return reply


def check_protocol(protocol: int, who: str) -> None:
    """Raise VersionMismatch unless `protocol` is ours."""
    if protocol != wire.PROTOCOL:
        raise VersionMismatch(
            "protocol",
            f"{who} speaks protocol {protocol} of the pool, this end protocol {wire.PROTOCOL}. "
            "Install the same version of millpond at both ends.",
        )


def check_torch(theirs: str, who: str, ours: str, us: str) -> None:
    """Raise VersionMismatch unless both versions of torch are ≥ `MIN_TORCH` and of one major version."""
    for version, owner in ((theirs, who), (ours, us)):
        if _numbers(version) < MIN_TORCH:
            raise VersionMismatch(
                "torch",
                f"{owner} has torch {version}; the pool needs {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer. "
                f"Install it there: pip install 'torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}'.",
            )
    if _numbers(theirs)[0] != _numbers(ours)[0]:
        raise VersionMismatch(
            "torch",
            f"{who} has torch {theirs}, {us} torch {ours}: their ops differ. "
            f"Install the same major version: pip install 'torch=={_numbers(ours)[0]}.*'.",
        )


def refusal(error: HandshakeError, ours: str) -> wire.Refused:
    """Return what to tell a caller whose greeting raised `error`."""
    if isinstance(error, AuthenticationError):
        return wire.Refused("token", str(error))
    code = error.what if isinstance(error, VersionMismatch) else "malformed"
    return wire.Refused(code, f"{error} (This end: protocol {wire.PROTOCOL}, torch {ours}.)")


def _proof(token: str, role: str, channel: bytes, *nonces: bytes) -> bytes:
    parts = [b"millpond-pool", role.encode(), *nonces]
    return hmac.digest(token.encode(), b"\0".join([*parts, channel] if channel else parts), hashlib.sha256)


def _numbers(version: str) -> tuple[int, int]:
    found = re.match(r"(\d{1,4})\.(\d{1,4})", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
