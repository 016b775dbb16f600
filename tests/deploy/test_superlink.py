"""What a SuperLink serves to other machines, and which app a SuperNode runs."""

import asyncio
import socket
import sys
import zipfile
from importlib import import_module
from io import BytesIO
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from flwr.app import ArrayRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.constant import NodeStatus
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.superlink.federation import NoOpFederationManager

from fedexperts.deploy import superlink
from fedexperts.deploy.bundle import bundle, contents, require_ours
from fedexperts.deploy.deployment import Federation, keys_in
from fedexperts.deploy.door import MAX_OTHER_BYTES, MAX_REQUEST_BYTES, ImpatientLoop, ImpatientProtocol, LimitedAccess
from fedexperts.deploy.flower_internals import SUPERLINK
from fedexperts.deploy.grid import SuperLinkGrid
from fedexperts.deploy.keys import make_keys
from fedexperts.deploy.link_state import DiskObjectStore, LimitedLinkState
from fedexperts.deploy.site import address_of
from fedexperts.deploy.supervisor import SuperNodeSupervisor, next_pause
from fedexperts.engines.flower.codec import MAX_TEXT_BYTES
from fedexperts.errors import BadMessage, BadRun, BadValue


def status(client, path, host="10.0.0.1", headers=()):
    """The status of a request of `client` to 10.0.0.1, which listens at `host`; 200 where the app beneath answers."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "client": client and (client, 1), "server": ("10.0.0.1", 9092)}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers]
    asyncio.run(LimitedAccess(app, host)(scope, None, send))
    return sent[0]["status"]


def test_a_proxys_word_that_is_no_address_is_not_believed():
    assert status("unknown", "/v1/control/start-run") == 403


CONTROL = ("/v1/control/start-run", "/v1/runtime/push-messages", "/docs", "/", "/v1/fleet", "/v1/control/v1/fleet/")


@pytest.mark.parametrize("path", CONTROL)
@pytest.mark.parametrize("client", ["10.0.0.2", "::ffff:10.0.0.2", "2001:db8::1", None])
def test_other_machines_reach_nothing_but_the_fleets_paths(client, path):
    assert status(client, path) == 403
    assert status(client, "/v1/fleet/activate-node") == 200


@pytest.mark.parametrize("path", CONTROL)
@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.1"])
def test_the_servers_own_machine_reaches_everything(client, path):
    assert status(client, path) == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_where_it_listens_anywhere_its_own_address_is_not_believed(host):
    """In some containers every request seems to come from there."""
    assert status("10.0.0.1", "/v1/control/start-run", host) == 403
    assert status("127.0.0.1", "/v1/control/start-run", host) == 200


@pytest.mark.parametrize("client", ["10.0.0.2", "127.0.0.1"])
def test_a_large_request_and_one_that_does_not_say_its_size_are_refused_before_they_are_read(client):
    allowed, larger = (("content-length", str(size)) for size in (MAX_REQUEST_BYTES, MAX_REQUEST_BYTES + 1))
    path = "/v1/fleet/push-object"
    assert status(client, path, headers=[allowed]) == 200
    assert status(client, path, headers=[larger]) == 413
    assert status(client, path, headers=[("transfer-encoding", "chunked")]) == 413
    for other in ("/v1/fleet/get-fab", "/v1/fleet/push-object/"):
        assert status(client, other, headers=[("content-length", str(MAX_OTHER_BYTES))]) == 200
        assert status(client, other, headers=[("content-length", str(MAX_OTHER_BYTES + 1))]) == 413
    assert MAX_REQUEST_BYTES > 2 * MAX_TEXT_BYTES + 10_000
    assert MAX_REQUEST_BYTES > FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 10_000


def test_nobody_else_is_believed_on_where_a_request_comes_from(monkeypatch, tmp_path):
    for module, names in SUPERLINK.items():
        for name in names:
            monkeypatch.setattr(import_module(module), name, None)
    monkeypatch.setattr(superlink, "end_with_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["superlink", "--host", "0.0.0.0"])
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    monkeypatch.setenv(superlink.OBJECTS_VARIABLE, str(tmp_path))
    monkeypatch.setenv(superlink.ABOUT_VARIABLE, str(tmp_path / "about.json"))
    command = import_module("flwr.superlink.cli.flower_superlink")
    monkeypatch.setattr(superlink, "allow_open_files", lambda: None)
    forwarded = []
    monkeypatch.setattr(superlink, "flower_superlink", lambda: forwarded.append(uvicorn.Config(None).forwarded_allow_ips))
    superlink.main()
    assert forwarded == ["127.0.0.1"]
    limits = command.uvicorn.run.keywords
    assert limits["http"] is ImpatientProtocol and limits["ws"] == "none"
    assert uvicorn.Config(None, **limits).get_loop_factory() is ImpatientLoop


def test_a_node_that_still_counts_as_connected_reconnects_at_once_and_an_unknown_one_never():
    state = LimitedLinkState(NoOpFederationManager(), ObjectStoreFactory().store())
    node = state.create_node("owner", "name", b"key", 30)
    assert state.activate_node(node, 30)
    assert state.activate_node(node, 30)
    assert not state.activate_node(node + 1, 30)
    assert [each.status for each in state.get_node_info(node_ids=[node])] == [NodeStatus.ONLINE]


def test_messages_wait_on_disk_and_leave_nothing_there(tmp_path):
    store, ours, theirs = DiskObjectStore(tmp_path), made_of(0, 1), made_of(1, 2)
    (kept,) = tmp_path.iterdir()  # of a record without arrays, from the start
    kept = {kept.name: kept.read_bytes()}
    for each in (ours, theirs):  # they share one array
        store.preregister(1, get_object_tree(each))
    contents = {id: part.deflate() for each in (ours, theirs) for id, part in get_all_nested_objects(each).items()}
    assert [store.get(id) for id in contents] == [b""] * len(contents)
    for id, content in contents.items():
        store.put(id, content)
        store.put(id, content)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents | kept
    assert {id: store.get(id) for id in contents} == contents
    assert sum(len(entry.content) for entry in store.store.values()) == 0

    store.delete(ours.object_id)
    left = {id: part.deflate() for id, part in get_all_nested_objects(theirs).items()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left | kept
    assert {id: store.get(id) for id in left} == left
    assert store.get(ours.object_id) is None
    store.delete_objects_in_run(1)
    assert {path.name for path in tmp_path.iterdir()} == {*kept}


def test_what_was_not_announced_or_has_another_hash_is_not_kept(tmp_path):
    store, each = DiskObjectStore(tmp_path), made_of(0, 1)
    with pytest.raises(NoObjectInStoreError):
        store.put(each.object_id, each.deflate())
    store.preregister(1, get_object_tree(each))
    with pytest.raises(ValueError, match="hash"):
        store.put(each.object_id, b"something else")
    assert store.get(each.object_id) == b""


def made_of(*numbers):
    """Records of an array for each number."""
    return RecordDict({"parts": ArrayRecord([np.full(4, float(number)) for number in numbers])})


def test_a_superlink_that_answers_no_more_ends_the_run_with_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing, as a process that is stopped
        grid = SuperLinkGrid(f"127.0.0.1:{silent.getsockname()[1]}", True, token="any")
        grid.set_run(Run.create_empty(1))
        grid._retry_invoker.max_time = 0
        grid._runtime_client._client.timeout = 0.2
        for ask in (grid.get_node_ids, lambda: grid.push_messages([]) or grid.pull_messages(["any"])):
            with pytest.raises(BadRun, match=r"answers no more \(ReadTimeout\); go on with --resume"):
                ask()
        grid.close()


def test_the_app_is_ours_however_it_is_packed():
    files = contents(bundle().content)
    assert {"pyproject.toml", "fedexperts_app/client.py", "fedexperts_app/server.py"} <= {name for name, _ in files}
    require_ours(bundle().content)
    require_ours(packed(files))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("change", ["a line more", "a file more", "a file twice", "no file of that kind"])
def test_an_app_that_is_not_ours_is_refused(change):
    files = contents(bundle().content)
    changed = {
        "a line more": packed([(name, data + b"\nimport os") for name, data in files]),
        "a file more": packed([*files, ("sitecustomize.py", b"import os")]),
        "a file twice": packed([*files, files[0]]),
        "no file of that kind": b"import os",
    }[change]
    with pytest.raises(BadMessage, match="will not be run"):
        require_ours(changed)


def packed(files):
    made = BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as file:
        for name, data in files:
            file.writestr(name, data)
    return made.getvalue()


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "fed.example"])
def test_without_keys_nothing_but_this_machine_is_served_or_joined(tmp_path, host):
    with pytest.raises(BadValue, match="--insecure"):
        Federation(tmp_path, host=host, port=9092, keys=None)
    with pytest.raises(BadValue, match="--insecure"):
        SuperNodeSupervisor("north", f"{host}:9092", tmp_path, None, [])


def test_missing_keys_and_a_missing_port_are_errors_that_name_them(tmp_path):
    with pytest.raises(BadValue, match=r"has no ca\.pem"):
        Federation(tmp_path, port=9092, keys=tmp_path)
    with pytest.raises(BadValue, match=r"has no ca\.pem"):
        SuperNodeSupervisor("north", "10.0.0.1:9092", tmp_path, tmp_path, [])
    with pytest.raises(BadValue, match="host:port"):
        SuperNodeSupervisor("north", "10.0.0.1", tmp_path, tmp_path, [])


@pytest.fixture
def server():
    """Answers one connection with `reply`, which a test sets."""
    listener, reply = socket.create_server(("127.0.0.1", 0)), []

    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            connection.sendall(reply[0])

    thread = Thread(target=answer)
    with listener:
        thread.start()
        yield SimpleNamespace(reply=reply, address=f"localhost:{listener.getsockname()[1]}")
        thread.join()


def test_a_server_that_ends_in_the_middle_of_a_handshake_is_tried_again(server, tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    supervisor = SuperNodeSupervisor("north", server.address, tmp_path / "home", tmp_path / "north", [])
    server.reply.append(b"")
    assert supervisor.obstacle() == f"nobody answers at {server.address} yet"


def test_a_server_without_tls_is_refused(server, tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    supervisor = SuperNodeSupervisor("north", server.address, tmp_path / "home", tmp_path / "north", [])
    server.reply.append(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(BadRun, match="does not speak TLS"):
        supervisor.obstacle()


def test_a_worker_that_dies_at_its_start_is_started_again_less_and_less_often():
    pauses = [0.0]
    for _ in range(8):
        pauses.append(next_pause(pauses[-1], lived=2.0))
    assert pauses == [0, 1, 3, 7, 15, 31, 60, 60, 60]
    assert next_pause(60.0, lived=3600.0) == 0


def test_a_client_with_damaged_keys_ends_with_a_sentence(tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    own = tmp_path / "north"
    (own / "ca.pem").write_text("garbage")
    with pytest.raises(BadValue, match=r"ca\.pem holds no certificate"):
        SuperNodeSupervisor("north", "localhost:1", tmp_path / "out", own, []).obstacle()
    (own / "node.key").write_text("garbage")
    with pytest.raises(BadValue, match=r"node\.key is no key that"):
        SuperNodeSupervisor("north", "localhost:1", tmp_path / "out", own, [])


def test_a_clients_key_that_is_none_or_another_ones_is_named(tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    clients = tmp_path / "server" / "clients"
    assert [*keys_in(clients).values()] == ["north"]
    (clients / "old.pub").write_bytes((clients / "north.pub").read_bytes())
    with pytest.raises(BadValue, match=r"old\.pub holds the key of north"):
        keys_in(clients)
    (clients / "old.pub").write_text("garbage")
    with pytest.raises(BadValue, match=r"old\.pub is not a key made by"):
        keys_in(clients)


def test_an_address_that_is_not_served_is_named(tmp_path):
    with pytest.raises(BadValue, match="--host :: is no IPv4 address"):
        Federation(tmp_path, host="::", port=1, keys=tmp_path)
    for wrong in ("localhost:99999", "a..b:9092", f"{'a' * 64}.example:9092", "localhost:²"):
        with pytest.raises(BadValue, match=r"--status .* is no address"):
            address_of(wrong, "--status")
