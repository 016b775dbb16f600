"""Keys and certificates: who may read them, whom they vouch for, and that none is ever replaced."""

import shutil
import socket
import ssl
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedexperts.deploy import keys as keys_module
from fedexperts.deploy.keys import make_keys, rotate_keys
from fedexperts.deploy.processes import require_files
from fedexperts.errors import BadValue


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation") / "keys"
    make_keys(folder, ["localhost", "10.0.0.1", "fed.example"], ["north", "east"])
    return folder


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def greet(keys, host, ca):
    """Shakes hands with a server that has the keys, as a client does that trusts `ca` and asks for `host`; who answered."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server" / "server.pem", keys / "server" / "server.key")

    def answer(listener):
        connection, _ = listener.accept()
        with connection:
            try:
                context.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, ConnectionError):
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=answer, args=(listener,))
        thread.start()
        try:
            with socket.create_connection(listener.getsockname()) as connection:
                trusting = ssl.create_default_context(cafile=str(ca))
                trusting.verify_flags |= ssl.VERIFY_X509_STRICT
                with trusting.wrap_socket(connection, server_hostname=host) as trusted:
                    return trusted.getpeercert()["subject"]
        finally:
            thread.join()


def test_there_is_a_folder_for_each_machine_with_what_it_needs_and_private_keys_are_their_owners_only(keys):
    assert set(files(keys)) == {
        *("ca.key", "ca.pem"),
        *(f"server/{name}" for name in ("ca.pem", "server.pem", "server.key", "clients/north.pub", "clients/east.pub")),
        *(f"{client}/{name}" for client in ("north", "east") for name in ("ca.pem", "node.key", "node.pub")),
    }
    private = list(keys.rglob("*.key"))
    assert len(private) == 4
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}


def test_each_clients_public_key_that_the_server_has_is_of_its_private_key_and_no_two_are_the_same(keys):
    of = {}
    for client in ("north", "east"):
        private = load_ssh_private_key((keys / client / "node.key").read_bytes(), None)
        assert private.curve.name == "secp384r1"
        registered = load_ssh_public_key((keys / "server" / "clients" / f"{client}.pub").read_bytes())
        assert registered.public_numbers() == private.public_key().public_numbers()
        of[client] = registered.public_numbers()
    assert of["north"] != of["east"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "10.0.0.1", "fed.example"])
def test_a_client_trusts_the_server_under_every_name_it_was_made_for_and_on_its_own_machine(keys, host):
    assert greet(keys, host, keys / "north" / "ca.pem")


def test_a_client_does_not_trust_it_under_another_name_or_when_it_has_another_authority(keys, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError):
        greet(keys, "other.example", keys / "north" / "ca.pem")
    make_keys(tmp_path / "others", ["localhost"], ["north"])
    with pytest.raises(ssl.SSLCertVerificationError):
        greet(keys, "localhost", tmp_path / "others" / "north" / "ca.pem")


def test_made_again_keys_stay_and_only_what_is_missing_is_added(tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    before = files(tmp_path)
    assert make_keys(tmp_path, ["localhost"], ["north"]) == []
    added = make_keys(tmp_path, ["localhost"], ["north", "west"])
    assert {path.parent.name for path in added} == {"west", "clients"}
    after = files(tmp_path)
    assert {name: data for name, data in after.items() if name in before} == before


class Killed(BaseException):
    pass


def test_killed_before_any_file_it_makes_the_rest_when_it_is_called_again(tmp_path, monkeypatch):
    write, hosts, names = keys_module.write_bytes, ["localhost"], ["north", "east"]
    whole = len(make_keys(tmp_path / "whole", hosts, names))
    for number in range(whole):
        folder, left = tmp_path / str(number), iter(range(number))

        def killed(*given, left=left):
            if next(left, None) is None:
                raise Killed
            write(*given)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(keys_module, "write_bytes", killed)
            make_keys(folder, hosts, names)
        before = files(folder)
        assert len(make_keys(folder, hosts, names)) == whole - number
        after = files(folder)
        assert after.keys() == files(tmp_path / "whole").keys()
        assert {name: after[name] for name in before} == before
        assert greet(folder, "localhost", folder / "north" / "ca.pem")
        for name in names:
            assert (
                after[f"{name}/node.pub"]
                == after[f"server/clients/{name}.pub"]
                == keys_module.public_key_of(folder / name / "node.key", name)
            )


def test_an_authority_whose_key_was_put_away_is_needed_only_to_sign(tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    (tmp_path / "ca.key").unlink()
    assert make_keys(tmp_path, ["localhost"], ["west"])
    assert not (tmp_path / "ca.key").exists()
    (tmp_path / "server" / "server.pem").unlink()
    with pytest.raises(BadValue, match=r"ca\.key, which has to sign .*server\.pem, is not there; bring it back"):
        make_keys(tmp_path, ["localhost"], ["west"])


def test_a_client_that_was_shut_out_stays_out(tmp_path):
    make_keys(tmp_path, ["localhost"], ["north", "east"])
    (tmp_path / "server" / "clients" / "north.pub").unlink()
    make_keys(tmp_path, ["localhost"], ["north", "east", "west"])
    assert {path.stem for path in (tmp_path / "server" / "clients").iterdir()} == {"east", "west"}


def test_where_only_the_servers_folder_was_brought_along_a_new_client_trusts_the_same_authority(tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    known = (tmp_path / "ca.pem").read_bytes()
    (tmp_path / "ca.pem").unlink()
    (tmp_path / "ca.key").unlink()
    make_keys(tmp_path, ["localhost"], ["west"])
    assert (tmp_path / "west" / "ca.pem").read_bytes() == known
    assert not (tmp_path / "ca.key").exists()


def test_a_client_whose_folder_was_moved_away_is_an_error_before_anything_is_written(tmp_path):
    make_keys(tmp_path / "keys", ["localhost"], ["north"])
    (tmp_path / "keys" / "north").rename(tmp_path / "north")
    before = files(tmp_path)
    with pytest.raises(BadValue, match=r"clients/north\.pub is there, and .*north/node\.key is not; leave north out"):
        make_keys(tmp_path / "keys", ["localhost"], ["west", "north"])
    assert files(tmp_path) == before
    assert make_keys(tmp_path / "keys", ["localhost"], ["west"])


def test_a_certificate_for_another_host_is_an_error_that_names_both(tmp_path):
    make_keys(tmp_path, ["10.0.0.1"], ["north"])
    with pytest.raises(BadValue, match=r"for 10\.0\.0\.1, localhost, 127\.0\.0\.1, ::1, and not for 10\.0\.0\.2"):
        make_keys(tmp_path, ["10.0.0.2"], ["north"])


@pytest.mark.parametrize("name", ["server", "ca.pem", "ca.key", "../north", "", "a b", ".north"])
def test_a_name_that_no_folder_can_have_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(BadValue, match="no client can be called"):
        make_keys(tmp_path / "keys", ["localhost"], ["north", name])
    assert not Path(tmp_path / "keys").exists()


def test_a_private_key_that_others_may_read_is_refused(tmp_path):
    make_keys(tmp_path, ["localhost"], ["north"])
    require_files(tmp_path / "north", ("ca.pem", "node.key"), "north")
    (tmp_path / "north" / "node.key").chmod(0o644)
    with pytest.raises(BadValue, match="chmod 600"):
        require_files(tmp_path / "north", ("ca.pem", "node.key"), "north")


def copied(keys, tmp_path):
    return Path(shutil.copytree(keys, tmp_path / "copy"))


def changed_by(folder, name):
    """The files that the rotation of `name` changed."""
    before = files(folder)
    written = rotate_keys(folder, name)
    after = files(folder)
    assert after.keys() == before.keys()
    changed = {path for path in after if after[path] != before[path]}
    assert {str(path.relative_to(folder)) for path in written} == changed
    return changed


def test_the_rotation_of_a_client_replaces_its_key_and_its_place_at_the_server_alone(keys, tmp_path):
    folder = copied(keys, tmp_path)
    assert changed_by(folder, "north") == {"north/node.key", "north/node.pub", "server/clients/north.pub"}
    private = load_ssh_private_key((folder / "north" / "node.key").read_bytes(), None)
    registered = load_ssh_public_key((folder / "server" / "clients" / "north.pub").read_bytes())
    assert registered.public_numbers() == private.public_key().public_numbers()
    assert (folder / "north" / "node.key").stat().st_mode & 0o777 == 0o600
    assert (folder / "north" / "node.pub").read_text().split()[2] == "north"


def test_the_rotation_of_the_server_keeps_its_hosts_and_its_authority(keys, tmp_path):
    folder = copied(keys, tmp_path)
    assert changed_by(folder, "server") == {"server/server.key", "server/server.pem"}
    for host in ("localhost", "10.0.0.1", "fed.example"):
        assert greet(folder, host, keys / "north" / "ca.pem")


def test_the_rotation_of_the_authority_leaves_every_connection_trusted_at_every_step(keys, tmp_path):
    folder = copied(keys, tmp_path)
    before = keys / "north" / "ca.pem"
    assert changed_by(folder, "ca") == {"ca.key", "ca.pem", "server/ca.pem", "north/ca.pem", "east/ca.pem"}
    assert greet(folder, "localhost", before)  # the server still has the former certificate
    assert greet(folder, "localhost", folder / "north" / "ca.pem")
    rotate_keys(folder, "server")
    assert greet(folder, "localhost", folder / "north" / "ca.pem")
    with pytest.raises(ssl.SSLCertVerificationError):
        greet(folder, "localhost", before)  # who did not get the new one in time
    rotate_keys(folder, "ca")
    assert (folder / "ca.pem").read_text().count("BEGIN CERTIFICATE") == 2  # the first of all is gone


def test_the_server_s_present_certificate_stays_trusted_when_the_authority_is_rotated_again(keys, tmp_path):
    folder = copied(keys, tmp_path)
    for _ in range(3):  # as after a kill in the middle
        rotate_keys(folder, "ca")
        assert greet(folder, "localhost", folder / "north" / "ca.pem")
    rotate_keys(folder, "server")
    assert greet(folder, "localhost", folder / "north" / "ca.pem")


def test_a_server_without_a_certificate_and_a_host_with_other_letters_are_named(keys, tmp_path):
    folder = copied(keys, tmp_path)
    (folder / "server" / "server.pem").unlink()
    with pytest.raises(BadValue, match=r"server\.pem, whose hosts the next one has, is not there"):
        rotate_keys(folder, "server")
    with pytest.raises(BadValue, match="give its ASCII form"):
        make_keys(tmp_path / "new", ["bücher.example"], ["north"])


@pytest.mark.parametrize(("file", "name"), [("ca.pem", "ca"), ("ca.key", "server"), ("server/server.pem", "server")])
def test_a_damaged_file_ends_a_rotation_with_a_sentence(keys, tmp_path, file, name):
    folder = copied(keys, tmp_path)
    (folder / file).write_text("garbage")
    with pytest.raises(BadValue, match=rf"{file} (holds no certificate|is no key that)"):
        rotate_keys(folder, name)


def test_a_rotation_of_what_is_not_there_is_refused(keys, tmp_path, fedexperts):
    folder = copied(keys, tmp_path)
    before = files(folder)
    (folder / "ca.key").unlink()
    code, _, err = fedexperts("keys", folder, "--rotate", "south")
    assert code == 2 and "has no node.key to replace; make the keys of a new client with --clients south" in err
    for name in ("server", "ca"):
        code, _, err = fedexperts("keys", folder, "--rotate", name)
        assert code == 2 and "which has to sign, is not there; bring it back" in err
    code, _, err = fedexperts("keys", folder, "--rotate", "north", "--host", "x", "--clients", "y")
    assert code == 2 and "or --rotate alone" in err
    code, _, err = fedexperts("keys", folder)
    assert code == 2 and "give --host and --clients" in err
    assert files(folder) == {path: data for path, data in before.items() if path != "ca.key"}
    code, out, _ = fedexperts("keys", folder, "--rotate", "north")
    assert code == 0 and "north/node.key" in out
