"""What the README shows, the Makefile names and the scripts say works as it stands there."""

import re
import shutil
import subprocess
from pathlib import Path

from transformers import AutoTokenizer

from fedexperts.config import read
from fedexperts.experiment.plan import plan
from fedexperts.experiment.setup import prepare_run
from fedexperts.models.files import BUNDLED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RUN_FILES = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
CHAT = (
    "{% for each in messages %}<s>{{ each['role'] + ': ' + each['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def test_the_run_of_the_readme_can_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my-run.toml").write_text(RUN_FILES[0])
    planned = plan(prepare_run(read(Path("my-run.toml"))))
    assert len(planned["clients"]) == 10
    assert 0 < sum(not client["full_fits"] for client in planned["clients"]) < 10  # some hold all experts, some do not


def test_the_run_on_conversations_of_the_readme_can_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (row,) = re.findall(r'`(\{"messages": .*?\}\]\})`', README)
    rows = [row.replace("my parcel", f"parcel {number}") for number in range(60)]
    rows += [row.replace("my parcel", f"parcel {number} {'x' * 600}") for number in range(4)]
    Path("chats.jsonl").write_text("\n".join(rows))
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["tiny"])
    tokenizer.chat_template = CHAT
    shutil.copytree(BUNDLED["tiny"], "instruct")
    tokenizer.save_pretrained("instruct")
    Path("chats.toml").write_text(RUN_FILES[1].replace('"smol"', '"instruct"'))
    planned = plan(prepare_run(read(Path("chats.toml"))))
    assert [row["dropped"] for row in planned["lost"]] == [4] and len(planned["clients"]) == 4
    assert planned["lost"][0]["prompts_cut"] == planned["lost"][0]["answers_cut"] == 0


def test_every_script_of_a_run_is_one_that_the_shell_can_read():
    scripts = sorted((ROOT / "runs").rglob("*.sh"))
    assert scripts
    for script in scripts:
        read = subprocess.run(["sh", "-n", script], capture_output=True, text=True)
        assert (read.returncode, read.stderr) == (0, ""), script


def test_every_file_that_the_makefile_or_a_script_names_is_there():
    made = [(ROOT / "Makefile").read_text(), *(script.read_text() for script in (ROOT / "runs").rglob("*.sh"))]
    named = {name for text in made for name in re.findall(r"(?<![\w/])(?:runs|benchmarks)/[\w./-]+\.(?:toml|sh|py)\b", text)}
    (loop,) = re.findall(r"for name in (.*?); do \$\(BIN\)/python benchmarks/\$\$name\.py", made[0])
    named |= {f"benchmarks/{name}.py" for name in loop.split()}
    assert len(named) >= 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
