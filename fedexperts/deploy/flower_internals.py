"""All of Flower that the deployment uses and that Flower's documentation does not list: an upgrade can break it without notice.

Everything else is from `flwr.app`, `flwr.clientapp`, `flwr.serverapp` and `flwr.simulation`.
`tests/deploy/test_flower_internals.py` counts these names, and says which of them a version of Flower no longer has.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, message_to_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import PushMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ConfirmMessageReceivedResponse, ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import PULL_MAX_TIME
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.exit import exit_handler
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf, make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore, ObjectEntry
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli import flower_superlink
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.cli import flower_supernode, flwr_clientapp
from flwr.supernode.fleet_http_connection import http_request_response

SUPERLINK = {
    "flwr.server.superlink.linkstate.linkstate_factory": ("InMemoryLinkState",),
    "flwr.supercore.object_store.object_store_factory": ("InMemoryObjectStore",),
    "flwr.superlink.cli.flower_superlink": ("uvicorn",),
    "flwr.superlink.extensions": ("get_middleware",),
    "flwr.superlink.servicer.fleet.fleet_handlers": ("push_messages", "confirm_message_received"),
}
SUPERNODE = {"flwr.supernode.start_client_internal": ("http_request_response", "subprocess", "time")}
SUPEREXEC = {"flwr.supercore.superexec.executor.subprocess_executor": ("subprocess",)}
"""Module → what a process of ours replaces in it, before it runs Flower's command."""


def replace(names: Mapping[str, tuple[str, ...]], **values: Any) -> None:
    """Puts each of `values` in place of the name in `names` that it is called by.

    Raises:
        AttributeError: this version of Flower has no such name.
    """
    modules = {name: import_module(module) for module, replaced in names.items() for name in replaced}
    for name, value in values.items():
        getattr(modules[name], name)
        setattr(modules[name], name, value)
