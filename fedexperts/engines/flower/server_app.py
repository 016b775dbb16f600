"""Flower's side of the server: a ServerApp that hands its grid to the code that runs the rounds."""

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


def server_app(work: Callable[[Grid], None]) -> ServerApp:
    """A ServerApp that calls `work` with its grid, and ends when it returns."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        work(grid)

    return app
