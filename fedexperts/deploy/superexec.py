"""The process of a SuperNode's SuperExec, which starts a process for each message: as Flower's own command runs it, but these are
forked from it, and so need not import Flower again.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from fedexperts.deploy import client_app as client_app  # what all forked processes need
from fedexperts.deploy.flower_internals import SUPEREXEC, exit_handler, flower_superexec, flwr_clientapp, replace
from fedexperts.io.processes import end_with


def forked(command: Sequence[str], **_: Any) -> None:
    """Forks a process that does what `command`, Flower's flwr-clientapp, would do."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # those that have ended
            pass
    parent = os.getpid()
    if os.fork():
        return
    code: Any = 1
    try:
        end_with(parent)  # Flower's own watch raises a signal in its thread, which does not wake a main thread that waits
        exit_handler.registered_exit_handlers.clear()  # these are for the end of the SuperExec
        sys.argv = list(command)
        flwr_clientapp()
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code or 0)


def main() -> None:
    replace(SUPEREXEC, subprocess=SimpleNamespace(Popen=forked, DEVNULL=None))
    flower_superexec()


if __name__ == "__main__":
    main()
