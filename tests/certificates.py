"""Certificates for tests of TLS: an authority, and what it signs."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from millpond.pool import tls
from millpond.settings import PoolSettings

DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates, each written with its key below `folder` as `<name>.crt` and `<name>.key`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.path = folder / f"{name}.crt"
        own = self._sign(self._name, self._key, ends=datetime.datetime.now(datetime.UTC) + DAY, names=[], is_ca=True)
        self.path.write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *names: str, days: float = 1) -> tls.Files:
        """Return a certificate for `names` (DNS or IP) that ends in so many days, and this authority's."""
        key = ec.generate_private_key(ec.SECP256R1())
        signed = self._sign(_name(name), key, ends=datetime.datetime.now(datetime.UTC) + days * DAY, names=list(names))
        cert_path, key_path = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        cert_path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return tls.Files(str(cert_path), str(key_path), str(self.path))

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        ends: datetime.datetime,
        names: list[str],
        is_ca: bool = False,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(ends - 10 * DAY)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(n) for n in names]), False)
        return builder.sign(self._key, hashes.SHA256())


def settings(files: tls.Files, **others: str) -> PoolSettings:
    """Return a pool's settings with these files."""
    paths = {f"tls_{kind}": Path(path) if path else None for kind, path in vars(files).items()}
    return PoolSettings(**paths, **others)  # type: ignore[arg-type]


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
