"""Where the files of a base model lie, and which of them are its weights."""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING

from fedexperts.errors import BadValue, nearest, shortened

BASES = Path(os.environ.get("FEDEXPERTS_BASES") or "~/.cache/fedexperts/bases").expanduser()
"""The folder of bases that are built on this machine."""
BUNDLED = {
    "tiny": Path(__file__).parent / "tiny",
    "small": Path(__file__).parents[2] / "assets" / "small",
    "smol": BASES / "smol",
    "smol-384": BASES / "smol-384",
}
"""`tiny` ships with the package; `small` is only in a checkout of the repository, which builds the others with `make smol`."""
HOW_MADE = {
    "small": "make it in a checkout of the repository with fedexperts pretrain runs/pretrain-small.toml",
    "smol": "build it in a checkout of the repository with make smol, set FEDEXPERTS_BASES to the folder that has it",
    "smol-384": "build it in a checkout of the repository with SMOL_SHARED=384 make smol, set FEDEXPERTS_BASES to its folder",
}
"""What to do if a base is not there."""
CONFIGS = Path(__file__).parent / "configs"
"""The folder with configurations of published models, which ship with the package: what they cost can be known without them."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""The files that name the weight files of a model with several; the first that exists counts."""
SINGLE = ("model.safetensors", "pytorch_model.bin")
"""The weight file of a model with one; the first that exists counts."""
SETTINGS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""Files that, besides the weights, decide the output of a model: its configuration (such as top-k) and its tokenizer."""
FETCHED = (*SETTINGS, "generation_config.json", "chat_template.jinja", "*.py")
"""Files that are fetched from the hub besides the weights; code in them runs only if it is trusted."""


def location_of(name: str) -> str:
    """The location that transformers loads `name` from: an existing folder, or else `name` as an id on the hub.

    Raises:
        BadValue: `name` is a path to a folder that does not exist.
    """
    if name in BUNDLED:
        return str(bundled_folder(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")):
        raise BadValue(
            f"model.name = {name!r} is a folder that does not exist; give an existing folder, tiny, small, or a hub id"
            f"{nearest(name, BUNDLED)}"
        )
    return name


def bundled_folder(name: str) -> Path:
    """The folder of the bundled base `name`.

    Raises:
        BadValue: it does not exist.
    """
    folder = BUNDLED[name]
    if not folder.is_dir():
        raise BadValue(
            f"the base {name!r} is not part of the package, and {folder} does not exist; {HOW_MADE[name]}, or give the "
            "path of its folder"
        )
    return folder


def config_names() -> list[str]:
    """The names of the configurations that ship with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def is_config_file(name: str) -> bool:
    """Whether `name` is the path of a config.json, or the name of one in CONFIGS, and no folder: a model without weights."""
    return not Path(name).is_dir() and (Path(name).suffix == ".json" or name in config_names())


def config_file(name: str) -> Mapping[str, Any]:
    """The content of a config.json, or of the one called `name` in CONFIGS.

    Raises:
        BadValue: it cannot be read, or is none.
    """
    path = CONFIGS / f"{name}.json" if name in config_names() else Path(name)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadValue(f"{path} could not be read as JSON ({shortened(str(error))}); give the config.json of a model") from error
    if not isinstance(content, dict) or content.get("model_type") not in CONFIG_MAPPING:
        raise BadValue(f"{path} names no model_type that transformers knows; give the config.json of a model")
    return content


def local_folder(where: str, revision: str | None = None) -> Path:
    """The folder with the files of the model at `where`, which are fetched from the hub if they are not here yet."""
    if Path(where).is_dir():
        return Path(where)
    settings = Path(snapshot_download(where, revision=revision, allow_patterns=[*FETCHED, *INDEXES]))
    index = next((name for name in INDEXES if (settings / name).exists()), None)
    wanted = weight_names(settings / index) if index else list(SINGLE)
    if index is None or not any((settings / name).exists() for name in wanted):
        snapshot_download(where, revision=revision, allow_patterns=wanted)
    return settings


def weight_files(folder: Path) -> list[Path]:
    """The weight files of the model in `folder`: those that its index names, or its only one.

    Other files with weights, which some folders have besides, are neither read nor hashed.

    Raises:
        BadValue: there are none, or one that the index names is missing.
    """
    index = next((folder / name for name in INDEXES if (folder / name).exists()), None)
    single = next((folder / name for name in SINGLE if (folder / name).exists()), None)
    if index is not None and (single is None or single.suffix == ".bin" or index.name == INDEXES[0]):
        files = [folder / name for name in weight_names(index)]
        if missing := [file.name for file in files if not file.exists()]:
            raise BadValue(
                f"{index.name} names {missing[0]}, which is not there ({len(missing)} of {len(files)} files are missing)"
            )
        return files
    if single is None:
        raise BadValue(f"{folder} has no weights: neither {SINGLE[0]} nor {INDEXES[0]}")
    return [single]


def weight_names(index: Path) -> list[str]:
    """The names of the files in `index`, sorted.

    Raises:
        BadValue: it is no index, or names files in other folders.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadValue(f"{index} is no index of weight files") from None
    if not names or not plain:
        raise BadValue(f"{index} names no weight files, or files outside its folder")
    return names


def files_hash(files: Sequence[Path]) -> str:
    """sha256 of the names and bytes of `files`."""
    digest = sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(file_digest(stream, "sha256").digest())
    return digest.hexdigest()
