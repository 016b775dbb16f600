"""Whatever is killed, the run ends, and no client loses client state. `python tests/chaos.py` kills more."""

from chaos import chaos


def test_after_the_server_and_all_of_a_client_are_killed_the_run_ends_and_no_clients_state_is_lost(tiny_folder, tmp_path):
    ended = chaos(tmp_path, tiny_folder, 1, clients=4, rounds=3, kinds=["server", "machine"])
    assert {kind for _, kind, _ in ended["killed"]} == {"server", "machine"}
    assert ended["server starts"] == 2
    assert ended["rounds"] == [1, 2, 3]
    assert ended["lost"] == []
    assert ended["server as on the local engine"]
    assert ended["answers"] > 6
