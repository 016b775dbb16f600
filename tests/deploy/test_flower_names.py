"""The names of Flower that are not public: which ones we use, and that they are there."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fedexperts"
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")
NAMES = {
    "flwr.app.message": ("remove_content_from_message",),
    "flwr.cli.build": ("build_fab_from_files",),
    "flwr.common.serde": (
        "fab_to_proto",
        "message_to_proto",
    ),
    "flwr.common.serde_utils": ("metadata_from_proto",),
    "flwr.proto.control_pb2": (
        "RegisterNodeRequest",
        "StartRunRequest",
    ),
    "flwr.proto.message_pb2": (
        "ConfirmMessageReceivedRequest",
        "ObjectTree",
    ),
    "flwr.proto.node_pb2": ("NodeInfo",),
    "flwr.proto.runtime_pb2": (
        "PullAppMessagesRequest",
        "PushAppMessagesRequest",
    ),
    "flwr.server.superlink.linkstate": (
        "InMemoryLinkState",
        "linkstate_factory",
    ),
    "flwr.supercore.cli": ("flower_superexec",),
    "flwr.supercore.constant": ("PULL_MAX_TIME",),
    "flwr.supercore.control": ("ControlHttpClient",),
    "flwr.supercore.exit": ("exit_handler",),
    "flwr.supercore.fab": ("Fab",),
    "flwr.supercore.inflatable.inflatable_object": (
        "InflatableObject",
        "get_all_nested_objects",
        "get_object_body",
        "get_object_head_values_from_object_content",
        "get_object_tree",
        "iterate_object_tree",
    ),
    "flwr.supercore.inflatable.inflatable_protobuf_utils": (
        "make_pull_object_fn_protobuf",
        "make_push_object_fn_protobuf",
    ),
    "flwr.supercore.inflatable.inflatable_utils": (
        "ObjectPullError",
        "inflate_object_from_contents",
        "pull_objects",
        "push_objects",
    ),
    "flwr.supercore.interceptors": ("RuntimeVersionHttpInterceptor",),
    "flwr.supercore.object_store": ("object_store_factory",),
    "flwr.supercore.object_store.in_memory_object_store": ("InMemoryObjectStore",),
    "flwr.supercore.primitives.asymmetric": ("public_key_to_bytes",),
    "flwr.supercore.run": ("Run",),
    "flwr.supercore.superexec.executor": ("subprocess_executor",),
    "flwr.supercore.task_identity": ("TaskIdentity",),
    "flwr.superlink": ("extensions",),
    "flwr.superlink.cli": ("flower_superlink",),
    "flwr.superlink.grid": ("HttpGrid",),
    "flwr.supernode.cli": (
        "flower_supernode",
        "flwr_clientapp",
    ),
    "flwr.supernode.fleet_http_connection": ("http_request_response",),
}
"""Module → names that its documentation does not list. Each new one is a new thing that an upgrade of Flower can break."""


def used():
    """Module → the names that the package imports from it, without the public modules."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.split(".")[0] == "flwr"
                and node.module not in PUBLIC
            ):
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


def test_no_other_names_of_flower_are_used():
    assert used() == {module: set(names) for module, names in NAMES.items()}
    assert sum(map(len, NAMES.values())) == 44  # it should fall


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_flower_has_the_name(module, name):
    pytest.importorskip("flwr")
    try:
        there = import_module(module)
    except ImportError as error:
        pytest.fail(f"this version of Flower has no module {module}, from which the deployment imports {name} ({error})")
    if not hasattr(there, name):
        try:
            import_module(f"{module}.{name}")
        except ImportError:
            pytest.fail(f"this version of Flower has no {name} in {module}, which the deployment uses")
