"""TLS 1.3 for the pool's connections: who shows which certificate, and what it means when that fails.

Who listens shows the certificate of its host; workers show their host's. A caller checks it against authorities of
its own and *one* name, at whatever address a worker may be; workers among themselves know which one to expect. Nothing
here ever falls back to less.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import time
from dataclasses import dataclass, replace
from pathlib import Path

from millpond.pool.errors import ConnectionLost, TlsError
from millpond.settings import PoolSettings, SettingsError

RECORD_BYTES = 16 * 1024
"""Most that one record of TLS holds, and one read of OpenSSL's returns."""

_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_DATES, _ISSUER, _NAME = {9, 10}, {18, 19, 20, 21}, {62, 64}
"""Codes of a failed check: X509_V_ERR_* in OpenSSL's x509_vfy.h."""


@dataclass(frozen=True)
class Files:
    """Absolute paths of PEM files: this end's certificate and key, and the authorities for the other end's."""

    cert: str = ""
    key: str = ""
    ca: str = ""

    @classmethod
    def of(cls, settings: PoolSettings) -> Files:
        """Return what the settings name."""
        paths = (settings.tls_cert, settings.tls_key, settings.tls_ca)
        return cls(*("" if path is None else str(path.absolute()) for path in paths))

    def for_workers(self, asks_certificate: bool) -> Files:
        """Return the files of a host's workers; the broker says whether their callers must show a certificate."""
        return self if asks_certificate else replace(self, ca="")

    def environment(self) -> dict[str, str]:
        """Return the variables that name these files wherever a program goes."""
        named = {"CERT": self.cert, "KEY": self.key, "CA": self.ca}
        return {f"MILLPOND_POOL_TLS_{name}": path for name, path in named.items() if path}


@dataclass(frozen=True)
class Secured:
    """TLS over one socket, after the handshake. OpenSSL reads and writes memory, the socket is ours.

    Over a socket of its own OpenSSL would ask the kernel twice for each record: a third of a receiver's time.
    """

    openssl: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    channel: bytes
    """What the proofs of the greeting are bound to: the listener's certificate."""


@dataclass(frozen=True)
class Listener:
    """How a broker or a worker does TLS."""

    context: ssl.SSLContext
    channel: bytes
    asks: bool
    """Whether callers must show a certificate."""

    def secure(self, sock: socket.socket, timeout_s: float) -> Secured:
        """Shake hands with a caller.

        Raises:
            OSError: it cannot be done (ssl.SSLError), the caller is gone, or silent (TimeoutError).
        """
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        openssl = self.context.wrap_bio(incoming, outgoing, server_side=True)
        _shake_hands(sock, openssl, incoming, outgoing, timeout_s)
        return Secured(openssl, incoming, outgoing, self.channel)


@dataclass(frozen=True)
class Caller:
    """How a caller does TLS: what it trusts and shows, and the name that the other end's certificate must carry."""

    context: ssl.SSLContext
    name: str
    shows: bool
    """Whether it has a certificate to show."""
    certificate: bytes | None = None
    """SHA-256 of the one certificate that it accepts, whoever signed it; None: it trusts authorities, and a name."""

    def secure(self, sock: socket.socket, peer: str, timeout_s: float) -> Secured:
        """Shake hands with who listens; `peer` is the address, for errors.

        Raises:
            TlsError: the peer does not speak TLS, or is not who it should be.
            OSError: it is gone, or silent (TimeoutError).
        """
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        openssl = self.context.wrap_bio(incoming, outgoing, server_hostname=self.name or None)
        try:
            _shake_hands(sock, openssl, incoming, outgoing, timeout_s)
        except ssl.SSLCertVerificationError as error:
            raise TlsError(_refusal(error, peer, self.name)) from None
        except ssl.SSLError as error:
            raise TlsError(_no_tls(error, peer)) from None
        shown = _digest(openssl.getpeercert(binary_form=True) or b"")
        if self.certificate is not None and shown != self.certificate:
            raise TlsError(f"{peer} shows another certificate than the one that the broker says it has.")
        return Secured(openssl, incoming, outgoing, shown)


def _shake_hands(
    sock: socket.socket, openssl: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    done = False
    while not done:
        try:
            openssl.do_handshake()
            done = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            with contextlib.suppress(OSError):  # the other end is told why, if it is still there
                sock.sendall(outgoing.read())
            raise
        sock.settimeout(max(1e-3, deadline - time.monotonic()))
        sock.sendall(outgoing.read())
        if not done:
            received = sock.recv(RECORD_BYTES)
            if not received:
                raise ConnectionAbortedError("it hung up")
            incoming.write(received)


def listener(files: Files) -> Listener | None:
    """Return how to listen; None without a certificate. With authorities, callers must show a certificate of theirs.

    Raises:
        SettingsError: the files cannot be used.
    """
    if not files.cert:
        if files.ca or files.key:
            raise SettingsError(
                "MILLPOND_POOL_TLS_CERT is not set, but another MILLPOND_POOL_TLS_* is: a broker needs a certificate "
                "to speak TLS. Set it (and MILLPOND_POOL_TLS_KEY), or unset the others to serve without TLS."
            )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # sessions are not resumed: each connection shows its certificates
    _load(context, files)
    if files.ca:
        context.verify_mode = ssl.CERT_REQUIRED
    own = _CERTIFICATE.search(Path(files.cert).read_text(errors="replace"))
    if own is None:
        raise SettingsError(f"{files.cert} (MILLPOND_POOL_TLS_CERT) does not begin with a certificate in PEM.")
    return Listener(context, _digest(ssl.PEM_cert_to_DER_cert(own[0])), asks=bool(files.ca))


def caller(settings: PoolSettings) -> Caller | None:
    """Return how to call brokers and workers; None without authorities to check them against.

    Raises:
        SettingsError: the files cannot be used.
    """
    files = Files.of(settings)
    if not files.ca:
        if files.cert or files.key or settings.tls_name:
            raise SettingsError(
                "MILLPOND_POOL_TLS_CA is not set, but another MILLPOND_POOL_TLS_* is: a client needs the authority "
                "that signed the pool's certificate to know the pool. Set it, or unset the others to go without TLS."
            )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.hostname_checks_common_name = False
    _load(context, files)
    return Caller(context, settings.tls_name or settings.address.rpartition(":")[0].strip("[]"), bool(files.cert))


def of_peer(certificate: bytes) -> Caller:
    """Return how to call a worker of the same lease, of which the broker says which certificate (SHA-256) it has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # `secure` compares the certificate itself
    context.verify_mode = ssl.CERT_NONE
    return Caller(context, name="", shows=False, certificate=certificate)


def hung_up(peer: str, error: BaseException | None, shows: bool) -> TlsError | ConnectionLost:
    """Return the error of a peer that ended the connection right after TLS's handshake.

    In TLS 1.3 a client is done before the listener has looked at its certificate: a refusal is read afterwards, as an
    alert, or (asyncio sends none) as an end. An end without a reason may also be the network's: it is no TlsError,
    which nobody tries again after.
    """
    kind = TlsError if isinstance(error, ssl.SSLError) else ConnectionLost
    why = f" ({error.reason})" if isinstance(error, ssl.SSLError) and error.reason else ""
    if shows:
        return kind(
            f"{peer} ended the connection after TLS's handshake{why}: most likely it does not accept the certificate "
            "in MILLPOND_POOL_TLS_CERT. See that it has not expired and that an authority which the pool trusts has "
            "signed it; the broker's log says what was wrong."
        )
    return kind(
        f"{peer} ended the connection after TLS's handshake{why}: most likely it asks its clients for a certificate. "
        "Set MILLPOND_POOL_TLS_CERT and MILLPOND_POOL_TLS_KEY to one that the pool's operator gave you."
    )


def _refusal(error: ssl.SSLCertVerificationError, peer: str, name: str) -> str:
    why = error.verify_message.rstrip(".")
    if error.verify_code in _DATES:
        return (
            f"the certificate of {peer} is not valid at this time: {why}. Have the pool's operator "
            "renew it and start the broker again, or set this machine's clock."
        )
    if error.verify_code in _NAME:
        return (
            f"the certificate of {peer} is not for {name!r}: {why}. Set MILLPOND_POOL_TLS_NAME to the "
            "name that it carries as subjectAltName, if that is the pool you mean."
        )
    if error.verify_code in _ISSUER:
        return (
            f"the certificate of {peer} is not signed by an authority in MILLPOND_POOL_TLS_CA: "
            f"{why}. It is not the pool, or the file is not the one that its operator gave you."
        )
    return f"the certificate of {peer} cannot be used: {why}. Have the pool's operator renew it."


def _no_tls(error: ssl.SSLError, peer: str) -> str:
    if error.reason == "WRONG_VERSION_NUMBER":
        return (
            f"{peer} answers without TLS. Have its operator set MILLPOND_POOL_TLS_CERT; or, on a network that you "
            "trust, unset MILLPOND_POOL_TLS_CA here to go without."
        )
    return (
        f"no TLS 1.3 connection with {peer} ({error.reason or error}). Check the address, and that the pool speaks TLS."
    )


def _load(context: ssl.SSLContext, files: Files) -> None:
    if files.key and not files.cert:
        raise SettingsError("MILLPOND_POOL_TLS_KEY is set without MILLPOND_POOL_TLS_CERT: set both, or neither.")
    try:
        if files.cert:
            context.load_cert_chain(files.cert, files.key or None, _no_passphrase)
    except OSError as error:
        raise SettingsError(
            f"The certificate {files.cert} with the key {files.key or files.cert} (MILLPOND_POOL_TLS_CERT, "
            f"MILLPOND_POOL_TLS_KEY) cannot be used: {_said(error)}. Both must be PEM files that belong together."
        ) from None
    try:
        if files.ca:
            context.load_verify_locations(files.ca)
    except OSError as error:
        raise SettingsError(
            f"The authorities in {files.ca} (MILLPOND_POOL_TLS_CA) cannot be used: {_said(error)}. "
            "It must be a PEM file with certificates."
        ) from None


def _no_passphrase() -> str:
    raise SettingsError(
        "The key in MILLPOND_POOL_TLS_KEY is encrypted, and nobody is there to be asked for its passphrase. Decrypt it "
        "with: openssl pkey -in KEY -out NEW; keep the file readable by its owner only."
    )


def _said(error: OSError) -> str:
    return str(error.reason or error) if isinstance(error, ssl.SSLError) else str(error.strerror or error)


def _digest(certificate: bytes) -> bytes:
    """Return SHA-256 of a certificate, in the manner of RFC 5929's tls-server-end-point."""
    return hashlib.sha256(certificate).digest()
