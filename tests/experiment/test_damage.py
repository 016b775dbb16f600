"""A damaged results folder: nothing goes on silently with it, and nothing ends in a traceback.

Each case damages a file of a copy of a run (a flipped bit, a cut, a removal), or swaps two. Then the run is resumed, reported or
exported. That must be refused with a sentence, or say what is damaged and go on to the same results, or, where the damage does
not matter to it, give the same results.
"""

import json
import shutil
from collections import Counter
from random import Random

import pytest
from older import without_hashes

from fedexperts import report
from fedexperts.config import RunConfig
from fedexperts.errors import BadRun, Damaged, FedExpertsError
from fedexperts.experiment import checkpoint, runner
from fedexperts.experiment.assess import last_scores
from fedexperts.experiment.progress import Quiet
from fedexperts.experiment.setup import Parts
from fedexperts.export import export
from fedexperts.io.manifest import LOGS, append, digest, read_object, write_sealed
from fedexperts.io.toml import checked

KINDS = ("flip", "cut", "remove", "swap")
PARTS = Parts()


class Said(Quiet):
    """Remembers what is said, and stops the run after a round."""

    def __init__(self, last=None):
        self.sentences, self.last = [], last

    def say(self, sentence):
        self.sentences.append(sentence)

    def round(self, server):
        if server.round == self.last:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def config(tiny_tree):
    training = {**tiny_tree["training"], "train": "lora", "parts": ["attention"], "local_steps": 1}
    tree = {**tiny_tree, "method": {"name": "flex", "select": "random"}, "training": training}
    return checked(RunConfig, {**tree, "evaluation": {"every": 1, "generate_tokens": 2}})


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    """A run of three rounds that was stopped after the second."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, folder, progress=Said(last=2), parts=PARTS)
    assert [saved.name for saved in sorted((folder / "checkpoint").iterdir())] == ["000001-train", "000002-train"]
    assert list(folder.glob("checkpoint/000002-train/clients/*/*.safetensors"))
    return folder


def resume(folder, config):
    said = Said()
    runner.run(config, folder, resume=True, progress=said, parts=PARTS)
    rows = {}
    for name in LOGS:
        lines = map(json.loads, (folder / name).read_text().splitlines())
        rows[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    files = [*checkpoint.latest(folder).glob("*.safetensors"), *(max(path.iterdir()) for path in (folder / "clients").iterdir())]
    return {**rows, **{str(path.relative_to(folder)): digest(path) for path in files}}, said.sentences


def reported(folder, config):
    report.write([folder], markdown=folder.with_name("report.md"))
    return folder.with_name("report.md").read_text().replace(str(folder), ""), []


def exported(folder, config):
    to = folder.with_name("model")
    shutil.rmtree(to, ignore_errors=True)
    export(folder, to, client="c01")
    return {path.name: digest(path) for path in to.glob("*.safetensors")}, []


USES = {"resume": resume, "report": reported, "export": exported}
CASES = {"resume": 40, "report": 100, "export": 60}


@pytest.fixture(scope="module")
def expected(stopped, config, tmp_path_factory):
    results = {}
    for name, use in USES.items():
        copy = tmp_path_factory.mktemp(name) / "run"
        shutil.copytree(stopped, copy)
        results[name], sentences = use(copy, config)
        assert sentences == []
    return results


def damage(folder, kind, rng):
    """Damages a file of `folder`, and returns its name; of two that are swapped, both."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, other = rng.sample(files, 2)
    content = path.read_bytes()
    match kind:
        case "flip" if content:
            place = rng.randrange(len(content))
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
        case "cut":
            path.write_bytes(content[: rng.randrange(max(len(content), 1))])
        case "remove":
            path.unlink()
        case "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
            return f"{path.relative_to(folder)} and {other.relative_to(folder)}"
    return str(path.relative_to(folder))


@pytest.mark.parametrize("use", USES)
def test_a_damaged_folder_is_refused_or_named_or_gives_the_same_results(stopped, config, expected, tmp_path, use):
    rng, ends = Random(f"damage/{use}"), Counter()
    for case in range(CASES[use]):
        copy, kind = tmp_path / str(case) / "run", KINDS[case % 4]
        shutil.copytree(stopped, copy)
        where = damage(copy, kind, rng)
        try:
            results, sentences = USES[use](copy, config)
        except FedExpertsError as error:
            ends["refused"] += 1
            assert len(str(error)) < 500 and "\n" not in str(error)
        else:
            ends["named" if sentences else "the same"] += 1
            assert results == expected[use], f"case {case}: {kind} of {where} went on, and said {sentences}"
        shutil.rmtree(copy.parent)
    assert ends["refused"] >= 5 and sum(ends.values()) == CASES[use]
    assert ends["named"] >= 5 or use != "resume"


def test_two_hundred_cases_are_tried():
    assert sum(CASES.values()) == 200


def test_a_damaged_newest_checkpoint_is_left_for_the_one_before(stopped, config, expected, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    (copy / "checkpoint/000002-train/weights.safetensors").write_bytes(b"")
    results, sentences = resume(copy, config)
    assert results == expected["resume"]
    (said,) = sentences
    assert (
        "000002-train/weights.safetensors has changed" in said and "continuing from the checkpoint before, 000001-train" in said
    )


def test_a_run_with_all_checkpoints_damaged_or_gone_is_not_begun_anew(stopped, config, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    for path in copy.glob("checkpoint/*/weights.safetensors"):
        path.unlink()
    with pytest.raises(
        Damaged, match=r"weights\.safetensors is missing, and no other checkpoint can be used; bring the folder back"
    ):
        resume(copy, config)
    shutil.rmtree(copy / "checkpoint")
    with pytest.raises(Damaged, match=r"the checkpoints in .* are missing, but 2 of its steps were done"):
        resume(copy, config)


def test_settings_that_changed_places_with_the_manifest_are_refused_in_a_sentence(stopped, config, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run/resolved.json").rename(tmp_path / "settings")
    (tmp_path / "run/manifest.json").rename(tmp_path / "run/resolved.json")
    (tmp_path / "settings").rename(tmp_path / "run/manifest.json")
    with pytest.raises(Damaged, match="holds no settings of a run, so it cannot be continued"):
        resume(tmp_path / "run", config)


def test_a_lost_client_state_comes_back_from_the_checkpoint(stopped, config, expected, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    shutil.rmtree(copy / "clients")
    assert resume(copy, config) == (expected["resume"], [])


def test_a_run_of_an_older_version_without_hashes_is_resumed_with_a_note(stopped, config, expected, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    shutil.rmtree(copy / "checkpoint/000001-train")
    without_hashes(copy)
    results, sentences = resume(copy, config)
    assert results == expected["resume"]
    assert [sentence for sentence in sentences if "by an older version without hashes" in sentence] == sentences != []


def test_as_many_checkpoints_stay_as_the_run_file_says(config, tmp_path):
    kept = config.checkpoint.model_copy(update={"keep": 1})
    runner.run(config.model_copy(update={"checkpoint": kept}), tmp_path / "run", parts=PARTS)
    assert [saved.name for saved in (tmp_path / "run/checkpoint").iterdir()] == ["000003-train"]


def test_logs_are_valid_json_whatever_is_logged(tmp_path):
    append(tmp_path / "log.jsonl", [{"loss": float("nan"), "all": [1.0, float("-inf")], "deep": {"value": float("inf")}}])

    def refuse(name):
        raise AssertionError(name)

    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"loss": None, "all": [1.0, None], "deep": {"value": None}}


def test_sums_that_are_not_finite_come_back_from_the_log(tmp_path):
    sums = {"metric": "perplexity", "examples": 1, "sums": {}, "labels": {}, "nll": float("nan"), "tokens": 2}
    append(tmp_path / "evals.jsonl", [{"client": "c01", "task": "a", "sums": sums}])
    scores = last_scores(tmp_path)["c01"].tasks["a"]
    assert (scores.nll != scores.nll, scores.tokens) == (True, 2)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "sha256": "0"}', b'{"a":' + b"9" * 5000 + b"}"]
)
def test_what_is_no_manifest_is_refused_with_a_sentence(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(BadRun, match=r"state\.json is damaged \(.{1,60}\)$"):
        read_object(tmp_path / "state.json")
    write_sealed(tmp_path / "state.json", {"a": 1})
    assert read_object(tmp_path / "state.json")["a"] == 1
