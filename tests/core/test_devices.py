import csv
from hashlib import sha256
from pathlib import Path

import pytest

from fedexperts.core.devices import GB, PRESETS, UTILIZATION, Profile, memories, profiles, trace_hash
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
    few, many = (memories(names, 10**6, "7", share={"uniform": [0.1, 1]}) for names in (CLIENTS[:2], CLIENTS))
    assert few == {name: many[name] for name in few}
    assert many != memories(CLIENTS, 10**6, "8", share={"uniform": [0.1, 1]})


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
        ({"gb": 0}, "has 0, which is no amount of memory; give a number above 0 and below 1e+30"),
        ({"share": {"uniform": [0.0, 1]}}, "has 0.0"),
        ({"gb": 1e300}, "1e+300"),
        ({"share": 1e305}, "1e+305"),
        ({"gb": 10**400}, "1000000"),
    ],
)
def test_anything_else_is_refused_by_name(given, named):
    with pytest.raises(BadValue, match=r"^devices") as refused:
        memories(CLIENTS, 100, "0", **given)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


MINE = {"flops": 2e12, "memory_gb": 8, "down_mbit": 80, "up_mbit": 16}
MY_PROFILE = Profile(flops_per_second=2e12, down_bytes_per_second=10e6, up_bytes_per_second=2e6, memory_bytes=8 * GB)


def test_a_job_takes_its_download_its_work_and_its_upload():
    assert MY_PROFILE.seconds(bytes_down=50_000_000, flops=6e12, bytes_up=1_000_000) == 5.0 + 3.0 + 0.5


def test_without_settings_there_are_no_profiles():
    assert profiles(None, CLIENTS, "0") == {}


def test_a_table_describes_the_device_of_all_in_the_units_of_vendors():
    assert profiles(MINE, CLIENTS, "0") == dict.fromkeys(CLIENTS, MY_PROFILE)
    (endless,) = profiles({key: MINE[key] for key in MINE if key != "memory_gb"}, ["a"], "0").values()
    assert endless.memory_bytes is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sustains_a_share_of_its_peak(name):
    usual, half = (profiles(name, ["a"], "0", *utilization)["a"] for utilization in ((), (0.5,)))
    assert usual.flops_per_second == UTILIZATION * PRESETS[name].flops_per_second
    assert half.flops_per_second == 0.5 * PRESETS[name].flops_per_second
    assert 0 < usual.up_bytes_per_second <= usual.down_bytes_per_second
    assert usual.memory_bytes is not None


def test_a_list_names_and_describes_devices_in_the_order_of_the_clients():
    devices = profiles(["phone", MINE], ["b", "a"], "0")
    assert devices == {"b": profiles("phone", ["b"], "0")["b"], "a": MY_PROFILE}


def test_of_a_mix_a_client_draws_the_same_however_many_there_are_and_whatever_the_order_of_the_mix():
    many = [f"c{number:03}" for number in range(400)]
    drawn = profiles({"mix": {"phone": 3, "laptop_gpu": 1}}, many, "7")
    assert profiles({"mix": {"laptop_gpu": 1, "phone": 3}}, many[:9], "7") == {name: drawn[name] for name in many[:9]}
    assert profiles({"mix": {"phone": 3, "laptop_gpu": 1}}, many, "8") != drawn
    phones = sum(device == profiles("phone", ["a"], "0")["a"] for device in drawn.values())
    assert 260 <= phones <= 340  # 300 on average, with a deviation of 9


def written(path, rows, columns=("flops", "memory_gb", "down_mbit", "up_mbit")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_a_trace_gives_its_rows_to_the_clients_in_order(tmp_path):
    path = written(tmp_path / "devices.csv", [(2e12, 8, 80, 16), (1e12, "", 8, 8), (9, 9, 9, 9)])
    devices = profiles({"csv": str(path)}, ["b", "a"], "0")
    assert devices == {"b": MY_PROFILE, "a": Profile(1e12, 1e6, 1e6, None)}


def test_a_trace_with_names_gives_each_client_its_row(tmp_path):
    rows = [("a", "x", 1e12, 4, 8, 8), ("z", "x", 1, 1, 1, 1), ("b", "x", 2e12, 8, 80, 16)]
    path = written(tmp_path / "devices.csv", rows, ("client", "model", "flops", "memory_gb", "down_mbit", "up_mbit"))
    assert profiles({"csv": str(path)}, ["b", "a"], "0") == {"b": MY_PROFILE, "a": Profile(1e12, 1e6, 1e6, 4 * GB)}


def test_the_trace_of_the_guide_can_be_read():
    clients = [f"c{number:02}" for number in range(1, 5)]
    devices = profiles({"csv": str(Path(__file__).parents[2] / "docs/devices.csv")}, clients, "0")
    assert list(devices) == clients
    assert len(set(devices.values())) > 1


def test_a_trace_is_known_by_its_hash(tmp_path):
    path = written(tmp_path / "devices.csv", [(1, 1, 1, 1)])
    assert trace_hash({"csv": str(path)}) == {str(path): sha256(path.read_bytes()).hexdigest()}
    assert trace_hash("phone") == trace_hash(None) == {}


HEAD = "flops,memory_gb,down_mbit,up_mbit\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no column flops"),
        ("flops,memory_gb,down,up_mbit\n1,1,1,1\n", "no column down_mbit"),
        (HEAD, "no device below its first line"),
        (HEAD + "1,1,1,1\n", "1 devices for 2 clients"),
        (HEAD + "1,1,1,1\n1,1,1\n", "line 3 does not have the 4 fields"),
        (HEAD + "1,1,1,1\n1,1,1,1,1\n", "line 3 does not have the 4 fields"),
        (HEAD + "1,1,1,1\n1,1,fast,1\n", "line 3 has down_mbit = 'fast'"),
        (HEAD + "1,1,1,1\n1,1,,1\n", "line 3 has down_mbit = ''"),
        (HEAD + "-1,1,1,1\n1,1,1,1\n", "line 2 has flops = -1.0"),
        (HEAD + "1,nan,1,1\n1,1,1,1\n", "line 2 has memory_gb = nan"),
        ("client," + HEAD + "a,1,1,1,1\na,1,1,1,1\n", "client a 2 times"),
        ("client," + HEAD + "a,1,1,1,1\nc,1,1,1,1\n", "no row for client b"),
        (HEAD + '"1,1,1,1\n', "no CSV file"),
    ],
)
def test_a_trace_that_will_not_do_is_refused_by_the_place(tmp_path, text, named):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(BadValue, match=r"bad\.csv") as refused:
        profiles({"csv": str(tmp_path / "bad.csv")}, ["a", "b"], "0")
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_trace_that_is_not_there_is_named():
    with pytest.raises(BadValue, match=r"^nowhere\.csv cannot be read"):
        profiles({"csv": "nowhere.csv"}, ["a"], "0")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("jetson_agx_orn", "did you mean jetson_agx_orin?"),
        (3, "= 3 is none of a preset"),
        (["phone"], "1 devices for 5 clients"),
        (["phone"] * 4 + [7], "= 7 is none of a preset"),
        ({"mix": {"phone": 1, "toaster": 2}}, "'toaster' is not one of"),
        ({"mix": {"phone": 0}}, "phone = 0"),
        ({"mix": {}}, "no table of presets and weights"),
        ({"mix": ["phone"]}, "no table of presets and weights"),
        ({"mix": {"phone": 1}, "csv": "x"}, "has mix"),
        ({**MINE, "up": 3}, "has up"),
        ({"flops": 1e12, "up_mbit": 1}, "has no down_mbit"),
        ({**MINE, "flops": -1}, "flops = -1"),
        ({**MINE, "up_mbit": float("nan")}, "up_mbit = nan"),
        ({**MINE, "memory_gb": 0}, "memory_gb = 0, which no device can have; give a number above 0 and below 1e+30"),
        ({**MINE, "memory_gb": 1e300}, "memory_gb = 1e+300"),
        ({**MINE, "flops": 10**400}, "flops = 1000000"),
        ({"mix": {"phone": 1e308, "laptop_gpu": 1e308}}, "laptop_gpu = 1e+308"),
        ({**MINE, "down_mbit": True}, "down_mbit = True"),
        ({**MINE, "down_mbit": "fast"}, "down_mbit = 'fast'"),
    ],
)
def test_a_profile_that_is_none_is_refused_by_name(given, named):
    with pytest.raises(BadValue, match=r"^devices\.profile") as refused:
        profiles(given, CLIENTS, "0")
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_profile_has_memory_unless_memory_is_given_by_itself():
    devices = profiles(MINE, CLIENTS, "0")
    assert memories(CLIENTS, 1000, "0", profiles=devices) == dict.fromkeys(CLIENTS, 8 * GB)
    assert memories(CLIENTS, 1000, "0", gb=2, profiles=devices) == dict.fromkeys(CLIENTS, 2 * GB)
    assert memories(CLIENTS, 1000, "0", share=0.5, profiles=devices) == dict.fromkeys(CLIENTS, 500)
