"""Errors of the pool: each says what happened, what it means, and what to do next.

PoolError
 ├── WireError                   a peer sent what the wire does not allow; the connection is dropped
 ├── HandshakeError              the two ends cannot work together
 │    ├── AuthenticationError    the token is wrong
 │    ├── TlsError               no TLS, or a certificate that one end does not accept
 │    └── VersionMismatch        protocol or torch differ too much
 ├── ConnectionLost              the worker or the broker is gone
 │    └── PeerSilent             nothing comes from its host any more: the network may be broken, and mend
 ├── LeaseError                  no lease can be had, or it has ended
 ├── NeedsCuda                 a program needs the CUDA runtime in its own process (also a RuntimeError)
 └── OpError                     an op failed on the worker (also a RuntimeError, as PyTorch's own errors are)
      └── OpRefused              the worker will not run it: not on its list, or a handle that is not the session's
"""

from __future__ import annotations

from typing import Literal

from millpond import MillpondError


class PoolError(MillpondError):
    """Base of the pool's errors."""


class WireError(PoolError):
    """A peer sent what the wire does not allow: malformed, too large, or at the wrong moment."""


class HandshakeError(PoolError):
    """The two ends of a connection cannot work together."""


class AuthenticationError(HandshakeError):
    """A peer did not prove that it knows the token."""


class TlsError(HandshakeError):
    """The peer does not speak TLS 1.3, or one end does not accept the other's certificate."""


class VersionMismatch(HandshakeError):
    """The peer speaks another protocol, or its torch is too far from ours; the message says what to install."""

    def __init__(self, what: Literal["protocol", "torch"], message: str) -> None:
        super().__init__(message)
        self.what: Literal["protocol", "torch"] = what


class ConnectionLost(PoolError, ConnectionError):
    """The worker or the broker is gone; what was on the device is lost."""


class PeerSilent(ConnectionLost):
    """Nothing comes from the other host any more, or no way leads there: the network may be broken, and mend."""


class LeaseError(PoolError):
    """A lease was refused, could not be had in time, or has ended."""


class NeedsCuda(PoolError, RuntimeError):
    """A program asked for what only the CUDA runtime in its own process could give."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(
            f"{what} needs a GPU and the CUDA runtime in this process; the pool's device is at a worker. {next_step}"
        )


class OpError(PoolError, RuntimeError):
    """An op failed on the worker; the message names it, its operands, and the line that issued it."""


class OpRefused(OpError):
    """The worker will not run an op: it is not on its list, or names what is not this session's."""
