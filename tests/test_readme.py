"""What the README shows works as it stands there."""

import json
import re
from pathlib import Path

from fedexperts.config import read
from fedexperts.plan import plan
from fedexperts.start import prepare_run

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_run_of_the_readme_can_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run_file,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    Path("my-run.toml").write_text(run_file)
    lines = [{"prompt": f"Say the number {n} twice", "response": f"{n} {n}"} for n in range(300)]
    Path("mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    planned = plan(prepare_run(read(Path("my-run.toml"))))
    assert len(planned["clients"]) == 10
    assert 0 < sum(not client["full_fits"] for client in planned["clients"]) < 10  # some hold all experts, some do not
