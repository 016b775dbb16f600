"""Client states on the client's disk, one version for each job that changed it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fedexperts.io.files import sync, write_tensors
from fedexperts.types import Job


@dataclass(frozen=True)
class ClientStateStore:
    """A folder per client.

    A job loads the version of the client's last accepted job. So a round that is repeated after a crash starts from the same
    state as the first time, whatever the interrupted round has written.
    """

    folder: Path

    def load(self, job: Job) -> dict[str, Tensor]:
        """The client state after the last job whose answer the server merged (`job.accepted`); empty if there is none."""
        accepted = self.accepted(job)
        return load_file(accepted[-1]) if accepted else {}

    def save(self, job: Job, client_state: Mapping[str, Tensor]) -> None:
        """Writes the version of `job` and removes all others except the one that it started from, in case it is not accepted.

        The file is synced to disk before this returns, so that it survives a power failure.
        """
        folder, stays = self.folder / job.client, self.accepted(job)[-1:]
        for path in folder.glob(".*"):  # partial files of a killed process
            path.unlink()
        earlier = self.versions(job.client)
        write_tensors(folder / f"{job.key}.safetensors", client_state)
        sync(folder)
        for path in earlier:
            if path not in stays and path.stem != job.key:
                path.unlink()

    def accepted(self, job: Job) -> list[Path]:
        """Versions up to the last accepted job, oldest first; later versions belong to answers that were not merged."""
        return [path for path in self.versions(job.client) if path.stem <= job.accepted and path.stem != job.key]

    def drop_newer(self, client: str, last: str) -> None:
        """Removes the versions of `client` after the job with key `last`; all versions if `last` is empty."""
        for path in self.versions(client):
            if path.stem > last:
                path.unlink()

    def versions(self, client: str) -> list[Path]:
        """Files of all versions of `client`, oldest first."""
        folder = self.folder / client
        return sorted(path for path in folder.iterdir() if path.name[0].isdigit()) if folder.is_dir() else []
