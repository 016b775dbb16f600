"""What a SuperLink lets in: requests that are small until it is known who sends them, from few connections that do not idle.

Flower reads a request before it looks at its signature, and without limits. A signature covers no more than the time of the
request, so it can be checked before the body is read.
"""

import asyncio
import binascii
import json
from base64 import b64decode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from ipaddress import IPv6Address, ip_address
from math import inf
from pathlib import Path
from time import time
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvloop import Loop

from fedexperts.deploy.processes import ABOUT_PATH, ALL_NETWORKS
from fedexperts.deploy.site import KEY_HEADER, MOST_AHEAD, MOST_BEHIND, SIGNATURE_HEADER, TIME_HEADER
from fedexperts.engines.message import PROTOCOL, VERSION

FLEET_PATH = "/v1/fleet/"
LARGE_PATHS = tuple(f"{FLEET_PATH}{name}" for name in ("push-object", "push-messages"))
MAX_REQUEST_BYTES = 2**24
"""Of a request's body, which is read into memory. Flower cuts arrays into objects of 5 MB, and the record with a message's texts
has at most twice codec.MAX_TEXT_BYTES."""
MAX_OTHER_BYTES = 2**16
"""Of a body at the fleet's other paths than LARGE_PATHS: Flower writes some of it into its log."""
MAX_UNKNOWN_BYTES = 2**12
"""Of a body whose sender is no registered node: those that join have a few hundred bytes."""
HEAD_SECONDS = 10.0
"""For a connection to shake hands, and then to send the head of its first request."""
BODY_SECONDS = 30.0
"""Between two pieces of a request's body."""
CLOSE_SECONDS = 1.0
"""For the last response on a connection to arrive before it is cut off."""
MOST_CONNECTIONS = 100
"""Of one address that is not this machine's; a client has a few."""
MOST_UNKNOWN = 32
"""Of those, that have not yet brought a request of a registered node: each takes some 0.65 MB while it is open."""
KNOWN = "fedexperts.known"
"""In the scope of a request: whether its sender is a registered node."""

Registered = Callable[[bytes], bool]
"""Whether a node with this public key (PEM) may join."""


class LimitedAccess:
    """Refuses requests with large bodies, and from other machines those for paths that nodes do not use.

    host: where the server listens. registered: None if there are no keys, and every node may join. about: a JSON file of which
    registered nodes are told at ABOUT_PATH, if it exists.
    """

    def __init__(self, app: ASGIApp, host: str, registered: Registered | None = None, about: Path | None = None) -> None:
        self.app, self.host, self.registered, self.about = app, host, registered, about

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif not (scope["path"].startswith(FLEET_PATH) or is_from_here(scope, self.host)):
            await refusal("this is served to the server's own machine only", 403)(scope, receive, send)
        elif body_size(scope) > (most := most_bytes(scope["path"])):
            await refusal(f"a request has {most:,} bytes at most, and says so", 413)(scope, receive, send)
        elif scope["path"] == ABOUT_PATH:
            await JSONResponse(self.said_to(scope), headers={"connection": "close"})(scope, receive, send)
        elif not self.knows(scope) and body_size(scope) > MAX_UNKNOWN_BYTES and scope["path"].startswith(FLEET_PATH):
            await refusal("this key is not registered here, or its signature is not of now", 401)(scope, receive, send)
        else:
            await self.app(scope, timed(receive), send)

    def knows(self, scope: Scope) -> bool:
        """Whether a request is from a registered node; where there are no keys, every request is. Noted in `scope`."""
        scope[KNOWN] = self.registered is None or is_signed(dict(scope["headers"]), self.registered)
        return bool(scope[KNOWN])

    def said_to(self, scope: Scope) -> dict[str, Any]:
        """What the server says of itself: more to a registered node than to others."""
        said = {"time": time(), "protocol": PROTOCOL, "version": VERSION}
        if not self.knows(scope):
            return said
        more = json.loads(self.about.read_bytes()) if self.about is not None and self.about.exists() else {}
        return {**said, **more, "registered": True}


def most_bytes(path: str) -> int:
    """Of the body of a request for `path`."""
    return MAX_REQUEST_BYTES if path in LARGE_PATHS or not path.startswith(FLEET_PATH) else MAX_OTHER_BYTES


def refusal(sentence: str, code: int) -> Response:
    """A response that ends the connection, of which nothing more is read."""
    return PlainTextResponse(f"{sentence}\n", status_code=code, headers={"connection": "close"})


def is_signed(headers: Mapping[bytes, bytes], registered: Registered) -> bool:
    """Whether `headers` prove that their sender has a registered key, as Flower's nodes do: by a signature of the time."""
    try:
        public = b64decode(headers[KEY_HEADER.encode()], validate=True)
        if not registered(public):
            return False
        signed = headers[TIME_HEADER.encode()]
        age = (datetime.now(UTC) - datetime.fromisoformat(signed.decode("ascii"))).total_seconds()
        key = load_pem_public_key(public)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not -MOST_AHEAD < age < MOST_BEHIND + MOST_AHEAD:
            return False
        key.verify(b64decode(headers[SIGNATURE_HEADER.encode()], validate=True), signed, ec.ECDSA(hashes.SHA256()))
    except (KeyError, ValueError, TypeError, binascii.Error, InvalidSignature):
        return False
    return True


def is_from_here(scope: Scope, host: str) -> bool:
    """Whether a request comes from this machine, which listens at `host`.

    Its own address counts only where it listens there alone, since its own processes then connect from there. One that listens
    on all networks may be in a container to which every request seems to come from the container's own address.
    """
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        return False
    return is_loopback_address(client[0]) or (host not in ALL_NETWORKS and server is not None and client[0] == server[0])


def is_loopback_address(text: str) -> bool:
    try:
        address = ip_address(text)
    except ValueError:  # a proxy may say anything
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback


def body_size(scope: Scope) -> float:
    """Bytes of a request's body; infinite where it comes in chunks, without its size. Uvicorn reads no more than it says."""
    headers = dict(scope["headers"])
    return inf if b"transfer-encoding" in headers else int(headers.get(b"content-length", 0))


def timed(receive: Receive) -> Receive:
    """`receive`, which takes a sender that pauses for longer than BODY_SECONDS in a body for one that has gone."""
    is_over = False

    async def piece() -> Message:
        nonlocal is_over
        if is_over:  # what is waited for now is that it goes
            return await receive()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                message = await receive()
        except TimeoutError:
            is_over = True
            return {"type": "http.disconnect"}
        is_over = not message.get("more_body", False)
        return message

    return piece


class ImpatientProtocol(H11Protocol):
    """Uvicorn's protocol with a limit for the size of a request's head, and here for its time and for connections."""

    patience: asyncio.TimerHandle

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.patience = self.loop.call_later(HEAD_SECONDS, self.end_if_silent, None)
        address = self.client and self.client[0]
        if address and not is_loopback_address(address):
            same = [each for each in self.connections if each.client and each.client[0] == address]
            unknown = sum(not (each.scope and each.scope.get(KNOWN)) for each in same)
            if len(same) > MOST_CONNECTIONS or unknown > MOST_UNKNOWN:
                transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.patience.cancel()  # it holds this protocol, and with it the buffers of its connection

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        if self.transport.is_closing():  # by itself it would read on until the other side closes, too
            self.loop.call_later(CLOSE_SECONDS, self.transport.abort)
        else:
            self.patience.cancel()
            self.patience = self.loop.call_later(HEAD_SECONDS, self.end_if_silent, answered)

    def end_if_silent(self, last: Any) -> None:
        """Cuts the connection off where no request has begun since the `last` one."""
        if self.cycle is last:
            self.transport.abort()


class ImpatientLoop(Loop):
    """An event loop whose servers give a connection HEAD_SECONDS to shake hands; by itself that takes up to a minute."""

    async def create_server(self, *arguments: Any, **options: Any) -> Any:
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", HEAD_SECONDS)
        return await super().create_server(*arguments, **options)
