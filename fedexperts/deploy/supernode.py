"""The process of Flower's SuperNode: as its own command starts it, but it runs no app other than ours, polls for messages more
often, and ends with its SuperExec, without which it would accept messages and answer none.
"""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from time import sleep
from types import SimpleNamespace
from typing import Any

from fedexperts.deploy.bundle import require_ours
from fedexperts.deploy.flower_internals import SUPERNODE, Fab, flower_supernode, http_request_response, replace
from fedexperts.deploy.processes import POLL_SECONDS, end_with_parent, module

GET_FAB = 4
"""The index, among the functions of a connection, of the one that fetches an app."""


@contextmanager
def connection(*arguments: Any) -> Iterator[tuple[Any, ...]]:
    """Flower's connection to the server, which accepts no other app than ours."""
    with http_request_response(*arguments) as functions:
        get_fab: Any = functions[GET_FAB]
        yield (*functions[:GET_FAB], only_ours(get_fab), *functions[GET_FAB + 1 :])


def only_ours(get_fab: Callable[[str, int], Fab]) -> Callable[[str, int], Fab]:
    def get(hash: str, run: int) -> Fab:
        fab = get_fab(hash, run)
        require_ours(fab.content)
        return fab

    return get


def superexec(command: Sequence[str]) -> None:
    """Starts ours, with the options that Flower's would get. When it ends so does this process, and the supervisor starts both
    again.
    """

    def watch() -> None:
        child.wait()
        os._exit(1)

    child = subprocess.Popen([*module("superexec"), *command[1:]])
    Thread(target=watch, daemon=True).start()


def main() -> None:
    end_with_parent()
    replace(
        SUPERNODE,
        http_request_response=connection,
        subprocess=SimpleNamespace(Popen=superexec),
        time=SimpleNamespace(sleep=lambda seconds: sleep(min(seconds, POLL_SECONDS))),
    )
    try:
        flower_supernode()
    finally:
        os._exit(1)  # its own web server would keep it alive


if __name__ == "__main__":
    main()
