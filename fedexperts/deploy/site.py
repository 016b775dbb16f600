"""What a client finds out before it joins: who answers at the server's address, what time it is there, and whose keys these are.

Needs neither torch nor Flower.
"""

import http.client
import json
import ssl
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

from fedexperts.deploy.processes import ABOUT_PATH
from fedexperts.engines.message import PROTOCOL, VERSION
from fedexperts.errors import BadRun, BadValue

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate

MOST_AHEAD, MOST_BEHIND = 5.0, 300.0
"""Seconds that a client's clock may differ from the server's, as Flower has it: requests are signed with their time."""
EXPIRY_DAYS = 30
"""A certificate that is valid for no longer is warned of."""
MOST_BYTES = 2**16
KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER = "flwr-public-key", "flwr-signature", "flwr-timestamp"
"""Headers in which Flower's nodes say who they are: base64 of the public key (PEM) and of the signature of the time (ISO)."""


@dataclass(frozen=True)
class ServerInfo:
    """A server that answers and can be trusted, as far as it says who it is: one of an earlier version does not."""

    ahead_seconds: float | None = None  # of this machine's clock
    protocol: int | None = None
    version: str | None = None
    expires: datetime | None = None  # its certificate
    said: Mapping[str, object] | None = None  # all that it said


def address_of(server: str, option: str = "--server") -> tuple[str, int]:
    """The host and the port in `server`, which `option` gave.

    Raises:
        BadValue: it is no address.
    """
    host, _, port = server.rpartition(":")
    try:
        host.encode("idna")  # as it is looked up
        is_address = bool(host) and "/" not in host and port.isdecimal() and int(port) <= 65535
    except UnicodeError:
        is_address = False
    if not is_address:
        raise BadValue(f"{option} {server!r} is no address; give host:port, such as 10.0.0.1:9092")
    return host.strip("[]"), int(port)


def ask(server: str, keys: Path | None, headers: Mapping[str, str] | None = None) -> ServerInfo | None:
    """Who answers at `server`; None if nobody does. headers: of the request, such as those that prove who asks.

    Raises:
        BadRun: one answers that cannot be trusted: its certificate is not from the authority in `keys`, or it speaks no TLS.
        BadValue: `keys` holds no certificate of an authority.
    """
    host, port = address_of(server)
    connection = http.client.HTTPConnection(host, port, timeout=10)
    if keys is not None:
        certificates_in(keys / "ca.pem")
        context = ssl.create_default_context(cafile=str(keys / "ca.pem"))
        connection = http.client.HTTPSConnection(host, port, timeout=10, context=context)
    try:
        connection.connect()
        expires = expiry_of_peer(connection.sock) if keys is not None else None
        before = time()
        connection.request("GET", ABOUT_PATH, headers=dict(headers or {}))
        reply = connection.getresponse()
        return info_in(reply.read(MOST_BYTES), (before + time()) / 2, expires)
    except ssl.SSLCertVerificationError as error:
        raise BadRun(
            f"the server at {server} has a certificate that {keys}/ca.pem does not vouch for "
            f"({error.verify_message}); give the keys that were made with the server's, for this host"
        ) from None
    except ssl.SSLEOFError:  # it ended in the middle of the handshake
        return None
    except ssl.SSLError as error:
        raise BadRun(f"the server at {server} does not speak TLS ({error.reason}); start it with --keys") from None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def signed_headers(keys: Path) -> dict[str, str]:
    """Headers that prove to a server that their sender has the private key in `keys`.

    Raises:
        BadValue: it cannot be read.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = node_key(keys)
    now = datetime.now(UTC).isoformat()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(now.encode(), ec.ECDSA(hashes.SHA256()))
    return {KEY_HEADER: b64encode(public).decode(), SIGNATURE_HEADER: b64encode(signature).decode(), TIME_HEADER: now}


def expiry_of_peer(connection: object) -> datetime | None:
    """When the certificate of the other side expires."""
    certificate = connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None
    text = certificate.get("notAfter") if certificate else None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(text), UTC) if isinstance(text, str) else None


def info_in(body: bytes, now: float, expires: datetime | None) -> ServerInfo:
    """What a server said of itself in `body` at the time `now` of this machine."""
    try:
        said = json.loads(body)
        return ServerInfo(now - float(said["time"]), int(said["protocol"]), str(said["version"]), expires, said)
    except (ValueError, KeyError, TypeError):
        return ServerInfo(expires=expires)


def require_same_protocol(info: ServerInfo, server: str) -> None:
    """Raises BadRun where the server's version and this one cannot work together."""
    if info.protocol not in (None, PROTOCOL):
        raise BadRun(
            f"the server at {server} runs FedExperts {info.version} (protocol {info.protocol}), and this machine has {VERSION} "
            f"(protocol {PROTOCOL}); install the same version on both"
        )


def clock_error(info: ServerInfo) -> str | None:
    """Why the server refuses requests with this machine's time; None if it does not."""
    ahead = info.ahead_seconds
    if ahead is None or -MOST_BEHIND < ahead < MOST_AHEAD:
        return None
    way, most = ("ahead of", MOST_AHEAD) if ahead > 0 else ("behind", MOST_BEHIND)
    return (
        f"its clock is {abs(ahead):,.0f} s {way} the server's, which refuses more than {most:,.0f} s; set the clock right, "
        "for example with timedatectl set-ntp true"
    )


def node_key(keys: Path) -> "EllipticCurvePrivateKey":
    """The private key in `keys`.

    Raises:
        BadValue: it cannot be read, or is of another kind than `fedexperts keys` makes.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key((keys / "node.key").read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadValue(f"{keys / 'node.key'} is no key that `fedexperts keys` made; give the client's folder again")
    return key


def identity(keys: Path) -> str | None:
    """The client whose keys these are; None of keys that were made before they said it.

    Raises:
        BadValue: the private key cannot be read, or is not that of the public key beside it.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = node_key(keys)
    if not (keys / "node.pub").is_file():
        return None
    public = (keys / "node.pub").read_bytes().split()
    if key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split() != public[:2]:
        raise BadValue(
            f"{keys / 'node.pub'} is not the public key of node.key beside it; give one client's folder as it was made"
        )
    return public[2].decode() if len(public) > 2 else None


def require_own_keys(keys: Path, name: str) -> None:
    """Raises BadValue where `keys` are another client's than `name`."""
    if (owner := identity(keys)) not in (None, name):
        raise BadValue(
            f"{keys} holds the keys of {owner}, and --name is {name}: with them it would take the place of {owner}; give {name} "
            f"the folder {name} that `fedexperts keys` made"
        )


def expiry_warnings(certificates: Mapping[str, datetime | None], now: datetime | None = None) -> Iterator[str]:
    """A sentence for each certificate, by what it is, that has expired or soon will."""
    now = now or datetime.now(UTC)
    for what, expires in certificates.items():
        if expires is not None and (expires - now).days < EXPIRY_DAYS:
            when = f"expired on {expires:%Y-%m-%d}" if expires < now else f"expires on {expires:%Y-%m-%d}"
            yield f"{what} {when}; make another with `fedexperts keys FOLDER --rotate`, where the keys were made"


def expiry_in(path: Path) -> datetime:
    """When the first certificate in `path` expires.

    Raises:
        BadValue: there is none in it.
    """
    return certificates_in(path)[0].not_valid_after_utc


def certificates_in(path: Path) -> "list[Certificate]":
    """The certificates in `path`, at least one.

    Raises:
        BadValue: there is none in it.
    """
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return load_pem_x509_certificates(path.read_bytes())
    except ValueError:
        raise BadValue(f"{path} holds no certificate; copy it again from the machine that made the keys") from None
