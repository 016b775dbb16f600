"""Results folders as older versions wrote them: without hashes."""

import json
import shutil

OLD = ("round", "task", "logs", "accepted", "kept")


def without_hashes(folder):
    """Turns the results folder into one of an older version, whose files may be edited, and returns it."""
    (folder / "manifest.json").unlink()
    for path in folder.glob("checkpoint/*/state.json"):
        state = json.loads(path.read_text())
        path.write_text(json.dumps({key: state[key] for key in OLD}))
        shutil.rmtree(path.parent / "clients", ignore_errors=True)
    return folder
