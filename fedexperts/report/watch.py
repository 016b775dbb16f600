"""The report of runs under way as a page that reloads itself, served to this machine alone."""

from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from fedexperts import report
from fedexperts.errors import BadValue, FedExpertsError
from fedexperts.report import page
from fedexperts.report.page import Form
from fedexperts.report.read import run_folders

LOOPBACK = "127.0.0.1"
PAGE = "text/html; charset=utf-8"
WRITTEN = ("plan.json", "rounds.jsonl", "ledger.jsonl", "evals.jsonl", "predictions.jsonl", "manifest.json")
SECONDS_TO_ANSWER = 30.0  # a connection that says nothing is closed


class Server(ThreadingHTTPServer):
    """Serves the page of `folders` and the code that it loads, and nothing else, on the loopback interface.

    Raises:
        BadValue: `port` is taken or may not be used.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int, seconds: int, baseline: str | None = None) -> None:
        self.folders, self.form, self.baseline = folders, Form(seconds=seconds), baseline
        self.lock, self.seen, self.text = Lock(), "", ""
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            raise BadValue(
                f"port {port} of this machine cannot be used ({error.strerror}); give another one with --port"
            ) from None

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def page(self) -> str:
        """The page, written anew if a file of the runs has changed since.

        Raises:
            FedExpertsError: there is no run yet, or its files cannot be read.
        """
        with self.lock:
            now = state_of(self.folders)
            if now != self.seen or not self.text:
                self.text = report.under_way(self.folders, self.baseline, self.form)
                self.seen = now
            return self.text


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD for two paths, to browsers that name this machine by its loopback address or as localhost.

    Another name may be one that a foreign page lets point to this machine, to read what is served here.
    """

    server: Server
    timeout = SECONDS_TO_ANSWER

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, *, with_body: bool) -> None:
        port = self.server.server_port
        paths: dict[str, tuple[str, Callable[[], str]]] = {
            "/": (PAGE, self.server.page),
            f"/{page.LIBRARY}": ("text/javascript; charset=utf-8", page.library),
        }
        kind, content = paths.get(self.path, ("", str))
        if self.headers.get("Host") not in {f"{name}:{port}" for name in (LOOPBACK, "localhost")}:
            self.send_error(HTTPStatus.FORBIDDEN, "open the address that fedexperts watch printed")
        elif not kind:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            try:
                status, text = HTTPStatus.OK, content()
            except (FedExpertsError, FileNotFoundError) as error:  # not there yet, or being replaced at this moment
                status, kind, text = HTTPStatus.SERVICE_UNAVAILABLE, PAGE, page.waiting(str(error), self.server.form)
            body = text.encode()
            self.send_response(status)
            for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")):
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the terminal belongs to the command."""


def state_of(folders: Sequence[Path]) -> str:
    """Equal as long as the files of the runs in `folders` are: their names, sizes and times.

    Raises:
        BadRun: there is no run.
    """
    found = [path / name for folder in folders for path in run_folders(folder) for name in WRITTEN]
    stats = [(path, path.stat()) for path in found if path.is_file()]
    return repr([(str(path), each.st_size, each.st_mtime_ns) for path, each in stats])


def serve(server: Server) -> None:
    """Serves until Ctrl-C."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
