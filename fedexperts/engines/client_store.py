"""Client states on the client's disk, one version for each job that changed it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedexperts.errors import Damaged
from fedexperts.io.files import sync, write_tensors
from fedexperts.types import Job, Tensors

SHA256 = "sha256"
"""Key, in the head of a file, of the `digest` of its tensors; older files have none and are not verified."""


@dataclass(frozen=True)
class ClientStateStore:
    """A folder per client.

    A job loads the version of the client's last accepted job. So a round that is repeated after a crash starts from the same
    state as the first time, whatever the interrupted round has written.
    """

    folder: Path

    def load(self, job: Job, set_aside: bool = False) -> dict[str, Tensor]:
        """The client state after the last job whose answer the server merged (`job.accepted`); empty if there is none.

        Raises:
            Damaged: its file is not what was written. With `set_aside` it is renamed, and the next job goes on from the version
                before; the same job fails again if it is repeated, unless the version is restored.
        """
        accepted = self.accepted(job)
        for aside in (self.folder / job.client).glob(f"damaged-*-in-{job.key}.safetensors"):
            version = aside.name.removeprefix("damaged-").partition("-in-")[0]
            if not accepted or version > accepted[-1].stem:
                raise damaged(aside.with_name(f"{version}.safetensors"), accepted)
        if not accepted:
            return {}
        last = accepted[-1]
        tensors = undamaged(last)
        if tensors is None:
            if set_aside:
                last.replace(last.with_name(f"damaged-{last.stem}-in-{job.key}.safetensors"))
            raise damaged(last, accepted[:-1])
        return tensors

    def save(self, job: Job, client_state: Mapping[str, Tensor]) -> None:
        """Writes the version of `job` and removes all others except the one that it started from, in case it is not accepted.

        The file is synced to disk before this returns, so that it survives a power failure.
        """
        folder, stays = self.folder / job.client, self.accepted(job)[-1:]
        for path in folder.glob(".*"):  # partial files of a killed process
            path.unlink()
        earlier = self.versions(job.client)
        write_tensors(folder / f"{job.key}.safetensors", client_state, {SHA256: digest(client_state)})
        sync(folder)
        for path in earlier:
            if path not in stays and path.stem != job.key:
                path.unlink()

    def accepted(self, job: Job) -> list[Path]:
        """Versions up to the last accepted job, oldest first; later versions belong to answers that were not merged."""
        return [path for path in self.versions(job.client) if path.stem <= job.accepted and path.stem != job.key]

    def has(self, client: str, key: str) -> bool:
        """Whether the version of the job `key` is there, or set aside since it is damaged."""
        folder = self.folder / client
        return (folder / f"{key}.safetensors").exists() or any(folder.glob(f"damaged-{key}-in-*.safetensors"))

    def drop_newer(self, client: str, last: str) -> None:
        """Removes the versions of `client` after the job with key `last`; all versions if `last` is empty."""
        for path in self.versions(client):
            if path.stem > last:
                path.unlink()

    def versions(self, client: str) -> list[Path]:
        """Files of all versions of `client`, oldest first."""
        folder = self.folder / client
        return sorted(path for path in folder.iterdir() if path.name[0].isdigit()) if folder.is_dir() else []


def damaged(version: Path, before: Sequence[Path]) -> Damaged:
    """The error of a version, which names the last of those `before` it."""
    then = f"from that of {before[-1].stem}" if before else "without"
    return Damaged(f"its client state of {version.stem} is damaged; restore {version}, or let it continue {then} in its next job")


def undamaged(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a version; None if they are not what was written."""
    try:
        with safe_open(path, "pt") as file:
            wanted = (file.metadata() or {}).get(SHA256)
        tensors = load_file(path)
    except SafetensorError:
        return None
    return tensors if wanted in (None, digest(tensors)) else None


def digest(tensors: Tensors) -> str:
    """sha256 of the names, dtypes, shapes and bytes of `tensors`."""
    whole = sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        whole.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
