"""Keys of a federation: an authority, the server's certificate from it, and a key pair for each client.

FOLDER/ca.pem  ca.key            the authority; its key signs, and is needed nowhere else
FOLDER/server/                   for the server: ca.pem, server.pem, server.key, and clients/NAME.pub of who may join
FOLDER/NAME/                     for client NAME: ca.pem, node.key, node.pub
"""

import os
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedexperts.errors import BadValue

DAYS = 3650
ALWAYS = ("localhost", "127.0.0.1", "::1")  # the server's own processes reach it there
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OURS = ("server", "ca.pem", "ca.key")
CURVE = ec.SECP384R1()


def make_keys(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[Path]:
    """All keys and certificates in `folder` that are not there yet; what is there stays as it is. Gives the files it wrote.

    hosts: names and addresses by which clients reach the server.

    Raises:
        BadValue: a client's name that no folder can have; a server's certificate that is there for other hosts; or a client whose
            public key is there, and whose private key is not.
    """
    for name in clients:
        if not NAME.fullmatch(name) or name in OURS:
            taken = ", ".join(OURS)
            raise BadValue(
                f"no client can be called {name!r}; give letters, digits, dots, dashes and underscores, and none of {taken}"
            )
    server = folder / "server"
    known = {name: server / "clients" / f"{name}.pub" for name in clients}
    if gone := [name for name, path in known.items() if path.exists() and not (folder / name / "node.key").exists()]:
        raise BadValue(
            f"{known[gone[0]]} is there, and {folder / gone[0] / 'node.key'} is not; leave {gone[0]} out if it has its folder "
            "already, or remove the one to have both made anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if not (folder / "ca.key").exists():
        authority = ec.generate_private_key(CURVE)
        written += [private(folder / "ca.key", pem(authority)), public(folder / "ca.pem", in_pem(authority_of(authority)))]
    ca = folder / "ca.pem"
    (server / "clients").mkdir(parents=True, exist_ok=True)
    if (server / "server.pem").exists():
        require_hosts(server / "server.pem", hosts)
    else:
        key = ec.generate_private_key(CURVE)
        written += [
            private(server / "server.key", pem(key)),
            public(server / "server.pem", in_pem(certificate(folder, key, [*dict.fromkeys([*hosts, *ALWAYS])]))),
            public(server / "ca.pem", ca.read_bytes()),
        ]
    for name in clients:
        if (folder / name / "node.key").exists():
            continue
        (folder / name).mkdir(exist_ok=True)
        node = ec.generate_private_key(CURVE)
        told = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        written += [
            private(folder / name / "node.key", node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())),
            public(folder / name / "node.pub", told),
            public(folder / name / "ca.pem", ca.read_bytes()),
            public(server / "clients" / f"{name}.pub", told),
        ]
    return written


def authority_of(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The certificate of an authority, signed by itself."""
    name = named("FedExperts federation")
    usage = x509.KeyUsage(
        False, False, False, False, False, True, True, False, False
    )  # it signs certificates and their revocation
    return (
        begun(name, name, key.public_key(), key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def certificate(folder: Path, key: ec.EllipticCurvePrivateKey, hosts: Iterable[str]) -> x509.Certificate:
    """The server's, for `hosts`, signed by the authority in `folder`."""
    authority = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    issuer = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes()).subject
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    usage = x509.KeyUsage(
        True, False, False, False, False, False, False, False, False
    )  # it signs what proves that it has the key
    return (
        begun(named("FedExperts server"), issuer, key.public_key(), authority.public_key())
        .add_extension(x509.SubjectAlternativeName(list(map(general_name, hosts))), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority, hashes.SHA384())
    )


def begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of machines differ
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def require_hosts(path: Path, hosts: Iterable[str]) -> None:
    """Raises BadValue when the certificate at `path` is not for all of `hosts`."""
    found = x509.load_pem_x509_certificate(path.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if missing := [host for host in hosts if general_name(host) not in names]:
        known = ", ".join(str(name.value) for name in names)
        raise BadValue(
            f"{path} is there already, for {known}, and not for {', '.join(missing)}; keys are never overwritten: "
            f"remove it and {path.with_name('server.key')} to have another made"
        )


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def in_pem(made: x509.Certificate) -> bytes:
    return made.public_bytes(Encoding.PEM)


def private(path: Path, data: bytes) -> Path:
    """A new file that only its owner reads."""
    return written_new(path, data, 0o600)


def public(path: Path, data: bytes) -> Path:
    """A new file that anyone may read."""
    return written_new(path, data, 0o644)


def written_new(path: Path, data: bytes, mode: int) -> Path:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    return path
