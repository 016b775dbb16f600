"""Keys of a federation: an authority, the server's certificate from it, and a key pair for each client.

FOLDER/ca.pem  ca.key            the authority; its key signs, and is needed nowhere else
FOLDER/server/                   for the server: ca.pem, server.pem, server.key, and clients/NAME.pub of clients that may join
FOLDER/NAME/                     for client NAME: ca.pem, node.key, node.pub, which has the name beside the key
"""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
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

from fedexperts.deploy.site import certificates_in, node_key
from fedexperts.errors import BadValue
from fedexperts.io.files import write_bytes

AUTHORITY_DAYS, SERVER_DAYS = 1825, 365
"""For which certificates are valid."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")  # by which the server's own processes reach it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = ("server", "ca", "ca.pem", "ca.key")
CURVE = ec.SECP384R1()
PRIVATE = 0o600
"""The permissions of a file that only its owner reads."""


def make_keys(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[Path]:
    """Makes all keys and certificates in `folder` that are missing, overwrites none, and returns the files it wrote.

    When it was killed at any moment, a second call makes the rest.

    hosts: names and addresses by which clients reach the server.

    Raises:
        BadValue: a client's name that no folder can have; a server's certificate that is there for other hosts; a client whose
            public key is there and whose private key is not; or an authority without its key, which would have to sign.
    """
    for name in clients:
        if not NAME.fullmatch(name) or name in RESERVED:
            raise BadValue(
                f"no client can be called {name!r}; give letters, digits, dots, dashes and underscores, and none of "
                f"{', '.join(RESERVED)}"
            )
    for host in hosts:
        if not host.isascii():
            raise BadValue(f"--host has {host!r}; give its ASCII form (xn--…), or its address")
    registered = {name: folder / "server" / "clients" / f"{name}.pub" for name in clients}
    if lost := [name for name, path in registered.items() if path.exists() and not (folder / name / "node.key").exists()]:
        raise BadValue(
            f"{registered[lost[0]]} is there, and {folder / lost[0] / 'node.key'} is not; leave {lost[0]} out if it has its "
            "folder already, or remove the one to have both made again"
        )
    files = NewFiles([])
    make_server_keys(folder, hosts, files)
    for name, path in registered.items():
        make_client_keys(folder, name, path, files)
    return files.paths


def rotate_keys(folder: Path, name: str) -> list[Path]:
    """Replaces the keys of `name` in `folder`, and returns the files it wrote. A second call after a kill makes all of them anew.

    name: a client, whose former key is refused as soon as the server has the new one; "server", which gets another key and a
    certificate for the same hosts; or "ca", the authority: then `ca.pem` has the new and the former certificate, so that clients
    trust the server's present certificate and its next one.

    Raises:
        BadValue: there are no such keys, or the authority's key is not there.
    """
    ca, server = folder / "ca.pem", folder / "server"
    if name not in ("server", "ca") and not (folder / name / "node.key").exists():
        raise BadValue(f"{folder / name} has no node.key to replace; make the keys of a new client with --clients {name}")
    if name in ("server", "ca") and not (folder / "ca.key").exists():
        raise BadValue(f"{folder / 'ca.key'}, which has to sign, is not there; bring it back")
    files = NewFiles([], replaces=True)
    if name == "ca":
        former = signer_of(server / "server.pem", ca)
        files.add(folder / "ca.key", lambda: pem(ec.generate_private_key(CURVE)), PRIVATE)
        own = certificate_pem(authority_certificate(key_at(folder / "ca.key")))
        for path in [ca, *sorted(folder.glob("*/ca.pem"))]:
            files.add(path, lambda: own + certificate_pem(former))
    elif name == "server":
        if not (server / "server.pem").exists():
            raise BadValue(
                f"{server / 'server.pem'}, whose hosts the next one has, is not there; make it with --host and --clients"
            )
        hosts = [str(each.value) for each in hosts_of(server / "server.pem")]
        files.add(server / "server.key", lambda: pem(ec.generate_private_key(CURVE)), PRIVATE)
        key = key_at(server / "server.key")
        files.add(server / "server.pem", lambda: certificate_pem(server_certificate(folder, key, hosts)))
    else:
        own_folder = folder / name
        files.add(own_folder / "node.key", lambda: node_pem(ec.generate_private_key(CURVE)), PRIVATE)
        files.add(own_folder / "node.pub", lambda: public_key_of(own_folder / "node.key", name))
        files.add(server / "clients" / f"{name}.pub", (own_folder / "node.pub").read_bytes)
    return files.paths


@dataclass(frozen=True)
class NewFiles:
    """The files that were written. replaces: whether those that exist are written anew, too."""

    paths: list[Path]
    replaces: bool = False

    def add(self, path: Path, make: Callable[[], bytes], mode: int | None = None) -> None:
        """Writes the result of `make` to `path`, unless the file exists and stays."""
        if self.replaces or not path.exists():
            write_bytes(path, make(), mode)
            self.paths.append(path)


def make_server_keys(folder: Path, hosts: Sequence[str], files: NewFiles) -> None:
    """The authority, and the server's certificate from it."""
    ca, server = folder / "ca.pem", folder / "server"
    if (server / "server.pem").exists():
        require_hosts(server / "server.pem", hosts)
        if not ca.exists():  # nor need its key exist: there is nothing to sign
            files.add(ca, (server / "ca.pem").read_bytes)
    else:
        if ca.exists() and not (folder / "ca.key").exists():
            signer = f"{folder / 'ca.key'}, which has to sign {server / 'server.pem'},"
            raise BadValue(f"{signer} is not there; bring it back, or give another folder")
        files.add(folder / "ca.key", lambda: pem(ec.generate_private_key(CURVE)), PRIVATE)
        files.add(ca, lambda: certificate_pem(authority_certificate(key_at(folder / "ca.key"))))
        files.add(server / "server.key", lambda: pem(ec.generate_private_key(CURVE)), PRIVATE)
        names = [*dict.fromkeys([*hosts, *LOCAL_HOSTS])]
        files.add(
            server / "server.pem", lambda: certificate_pem(server_certificate(folder, key_at(server / "server.key"), names))
        )
    files.add(server / "ca.pem", ca.read_bytes)
    (server / "clients").mkdir(exist_ok=True)


def make_client_keys(folder: Path, name: str, registered: Path, files: NewFiles) -> None:
    """A client's key pair, whose public key the server finds at `registered`."""
    own = folder / name
    if (own / "ca.pem").exists():  # written last: where its public key is missing, somebody has shut the client out
        return
    files.add(own / "node.key", lambda: node_pem(ec.generate_private_key(CURVE)), PRIVATE)
    files.add(own / "node.pub", lambda: public_key_of(own / "node.key", name))
    files.add(registered, (own / "node.pub").read_bytes)
    files.add(own / "ca.pem", (folder / "ca.pem").read_bytes)


def key_at(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key of the authority or the server at `path`.

    Raises:
        BadValue: it is none that `make_keys` makes.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadValue(f"{path} is no key that `fedexperts keys` made; bring back the one that it made")
    return key


def public_key_of(path: Path, name: str) -> bytes:
    """The public key of the private one at `path`, as OpenSSH writes it, with the `name` of the client whose it is."""
    return node_key(path.parent).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode()


def node_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def authority_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The certificate of an authority, signed by itself."""
    name = x509_name("FedExperts federation")
    usage = x509.KeyUsage(
        False, False, False, False, False, True, True, False, False
    )  # it signs certificates and their revocation
    return (
        certificate_builder(name, name, key.public_key(), key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def server_certificate(folder: Path, key: ec.EllipticCurvePrivateKey, hosts: Iterable[str]) -> x509.Certificate:
    """The server's, for `hosts`, signed by the authority in `folder`."""
    authority = key_at(folder / "ca.key")
    issuer = certificates_in(folder / "ca.pem")[0].subject
    usage = x509.KeyUsage(
        True, False, False, False, False, False, False, False, False
    )  # it signs what proves that it has the key
    return (
        certificate_builder(x509_name("FedExperts server"), issuer, key.public_key(), authority.public_key(), SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(list(map(general_name, hosts))), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority, hashes.SHA384())
    )


def certificate_builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of machines differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def x509_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def require_hosts(path: Path, hosts: Iterable[str]) -> None:
    """Raises BadValue when the certificate at `path` is not for all of `hosts`."""
    names = hosts_of(path)
    if missing := [host for host in hosts if general_name(host) not in names]:
        known = ", ".join(str(name.value) for name in names)
        raise BadValue(
            f"{path} is there already, for {known}, and not for {', '.join(missing)}; keys are never overwritten: "
            f"remove it and {path.with_name('server.key')} to have another made"
        )


def signer_of(server: Path, ca: Path) -> x509.Certificate:
    """Of the certificates in `ca` the one that signed that of the server; the first one where none did, or it is not there."""
    known = certificates_in(ca)
    if server.exists():
        [signed, *_] = certificates_in(server)
        for each in known:
            with suppress(InvalidSignature, ValueError):
                signed.verify_directly_issued_by(each)
                return each
    return known[0]


def hosts_of(path: Path) -> x509.SubjectAlternativeName:
    """The hosts that the certificate at `path` is for."""
    return certificates_in(path)[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
