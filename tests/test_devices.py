import pytest

from fedexperts.devices import memories
from fedexperts.errors import BadValue

CLIENTS = [f"c{number:02}" for number in range(1, 6)]


def test_without_settings_memory_has_no_limit():
    assert memories(CLIENTS, 100, "0") == dict.fromkeys(CLIENTS)


def test_one_number_is_for_all():
    assert memories(CLIENTS, 100, "0", gb=2) == dict.fromkeys(CLIENTS, 2 * 10**9)
    assert memories(CLIENTS, 1000, "0", share=0.5) == dict.fromkeys(CLIENTS, 500)


def test_a_list_is_in_the_order_of_the_clients():
    assert memories(["b", "a"], 1000, "0", share=[0.1, 0.2]) == {"b": 100, "a": 200}


def test_drawn_memories_lie_between_their_bounds_and_differ():
    drawn = memories(CLIENTS, 10**6, "0", share={"uniform": [0.4, 0.6]})
    assert all(400_000 <= memory <= 600_000 for memory in drawn.values())
    assert len(set(drawn.values())) == len(CLIENTS)


def test_bounds_may_be_equal():
    assert memories(CLIENTS, 100, "0", gb={"uniform": [2, 2]}) == dict.fromkeys(CLIENTS, 2 * 10**9)


def test_a_client_draws_the_same_however_many_there_are():
    few, many = (memories(names, 10**6, "7", share={"uniform": [0, 1]}) for names in (CLIENTS[:2], CLIENTS))
    assert few == {name: many[name] for name in few}
    assert many != memories(CLIENTS, 10**6, "8", share={"uniform": [0, 1]})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"gb": 1, "share": 1}, "give one of them"),
        ({"gb": [1, 2]}, "2 numbers for 5 clients"),
        ({"gb": "lots"}, "'lots'"),
        ({"gb": True}, "True"),
        ({"gb": {"normal": [1, 2]}}, "normal"),
        ({"share": {"uniform": [1]}}, "uniform"),
        ({"share": {"uniform": ["a", "b"]}}, "'a'"),
        ({"gb": {"uniform": [2, 1]}}, "uniform from 2 up to 1"),
        ({"share": ["a", "b", "c", "d", "e"]}, "'a'"),
        ({"share": [1, 2, 3, 4, float("nan")]}, "nan"),
        ({"gb": float("inf")}, "inf"),
        ({"gb": float("nan")}, "nan"),
        ({"gb": -1}, "-1"),
    ],
)
def test_anything_else_is_refused_by_name(given, named):
    with pytest.raises(BadValue, match=r"^devices") as refused:
        memories(CLIENTS, 100, "0", **given)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
