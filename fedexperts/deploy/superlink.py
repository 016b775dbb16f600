"""The process of Flower's SuperLink: as its own command starts it, and closed where that leaves it open.

Its APIs share one port, and one of them, which has no passwords, starts runs: so other machines are served only what nodes use.
What is let in is limited before it is known who sends it (`door`). A node that reconnects has its place back at once; Flower's
own refuses it until it is missed, for a minute. And messages wait on disk: those of ten clients that answer with a model each
would take as many models of memory.
"""

import os
import resource
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.middleware import Middleware

from fedexperts.deploy.door import ImpatientProtocol, LimitedAccess
from fedexperts.deploy.flower_internals import SUPERLINK, fleet_handlers, flower_superlink, replace
from fedexperts.deploy.link_state import DiskObjectStore, LimitedLinkState, require_recipient, require_reply
from fedexperts.deploy.processes import ABOUT_VARIABLE, OBJECTS_VARIABLE, end_with_parent


def allow_open_files() -> None:
    """Lets this process open as many files, connections among them, as its user may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    end_with_parent()
    os.environ["FORWARDED_ALLOW_IPS"] = "127.0.0.1"  # whose word is taken on where a request comes from
    host = sys.argv[sys.argv.index("--host") + 1]
    registered = LimitedLinkState.has if "--enable-supernode-auth" in sys.argv else None
    about = Path(os.environ[ABOUT_VARIABLE])
    impatient: Any = {"http": ImpatientProtocol, "loop": "fedexperts.deploy.door:ImpatientLoop", "ws": "none"}
    replace(
        SUPERLINK,
        get_middleware=lambda: (Middleware(LimitedAccess, host, registered, about),),
        uvicorn=SimpleNamespace(run=partial(uvicorn.run, **impatient)),
        InMemoryLinkState=LimitedLinkState,
        push_messages=require_reply(fleet_handlers.push_messages),
        confirm_message_received=require_recipient(fleet_handlers.confirm_message_received),
        InMemoryObjectStore=partial(DiskObjectStore, Path(os.environ[OBJECTS_VARIABLE])),
    )
    allow_open_files()
    flower_superlink()


if __name__ == "__main__":
    main()
