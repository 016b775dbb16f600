"""The card's recipe for lm-evaluation-harness, run on a tiny task: it scores a folder as our own metric does."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest
from transformers import AutoTokenizer

import fedexperts
from fedexperts.core.evaluation import score
from fedexperts.data.encode import Encoder
from fedexperts.export import export, load
from fedexperts.types import Example

TASK = """\
task: quiz
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc_norm
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval (pip install lm-eval)")
@pytest.mark.parametrize("client", [None, "c01"], ids=["global", "client"])
def test_the_recipe_of_the_card_gives_our_scores(client, tiny_tree, tmp_path):
    training = {**tiny_tree["training"], "train": "lora", "rank": 4, "lr": 0.05}
    tree = {**tiny_tree, "training": training, "federation": {"rounds": 1}}
    fedexperts.run(tree, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "FOLDER", client)
    rows = [
        {"question": f"Double: {word}=>", "choices": [word * 2, word, word[::-1]], "gold": index % 3}
        for index, word in enumerate(("abc", "xyzz", "lemon", "tea", "qrst", "mno"))
    ]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "quiz.yaml").write_text(TASK.format(file=tmp_path / "quiz.jsonl"))

    card = (tmp_path / "FOLDER" / "README.md").read_text()
    (recipe,) = re.findall(r"```sh\n(lm_eval .*?)  #", card)
    assert ("trust_remote_code=True" in recipe) == (client is not None)
    command = [
        *shlex.split(recipe.replace("arc_easy,piqa", "quiz")),
        "--include_path",
        ".",
        "--device",
        "cpu",
        "--output_path",
        "out",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["quiz"]["acc_norm,none"]

    model = load(tmp_path / "FOLDER")
    quiz = [
        Example(row["question"], row["choices"][row["gold"]], "quiz", "likelihood", choices=tuple(row["choices"])) for row in rows
    ]
    encoder = Encoder(AutoTokenizer.from_pretrained(tmp_path / "FOLDER"), 64)
    assert score(model, quiz, encoder).main("quiz") == pytest.approx(theirs)
