"""What Flower calls an app and sends to every node: here two imports of what is installed there already."""

from hashlib import sha256
from io import BytesIO
from warnings import catch_warnings, simplefilter
from zipfile import BadZipFile, ZipFile

from fedexperts.deploy.flower_internals import Fab, build_fab_from_files
from fedexperts.errors import BadMessage

FILES = {
    "pyproject.toml": """\
[project]
name = "fedexperts-app"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedexperts"

[tool.flwr.app.components]
serverapp = "fedexperts_app.server:app"
clientapp = "fedexperts_app.client:app"
""",
    "fedexperts_app/__init__.py": "",
    "fedexperts_app/server.py": "from fedexperts.deploy.server_app import app as app\n",
    "fedexperts_app/client.py": "from fedexperts.deploy.client_app import app as app\n",
}


def bundle() -> Fab:
    """The app as Flower carries it."""
    with catch_warnings():
        simplefilter("ignore", DeprecationWarning)  # of a package that Flower calls by an old name
        content, _ = build_fab_from_files({name: text.encode() for name, text in FILES.items()})
    return Fab(sha256(content).hexdigest(), content, {})


def require_ours(content: bytes) -> None:
    """Raises BadMessage unless `content` is the app as it is here: a node runs no code that comes over the network."""
    try:
        is_ours = contents(content) == contents(bundle().content)
    except BadZipFile:
        is_ours = False
    if not is_ours:
        raise BadMessage(
            "the server sent an app that is not the one of this version of FedExperts, and it will not be run; "
            "install the same version on both sides"
        )


def contents(content: bytes) -> list[tuple[str, bytes]]:
    """The files of an app; how they are compressed may differ from machine to machine."""
    with ZipFile(BytesIO(content)) as files:
        return [(info.filename, files.read(info)) for info in files.infolist()]
