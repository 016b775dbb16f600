"""What clients keep to themselves, on their own disk, one version for each round that changed it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fedexperts.io.files import sync, write_tensors
from fedexperts.types import Job


@dataclass(frozen=True)
class ClientStateStore:
    """A folder for each client.

    A job reads the version of the client's last job whose answer counted. So a round that is done again after a kill starts from
    the same state as the first time, whatever it had written by then.
    """

    folder: Path

    def load(self, job: Job) -> dict[str, Tensor]:
        """What the client kept in the last of its jobs whose answer the server merged (`job.accepted`)."""
        counted = self.counted(job)
        return load_file(counted[-1]) if counted else {}

    def save(self, job: Job, client_state: Mapping[str, Tensor]) -> None:
        """A new version. The one that this job started from stays, in case its answer does not count; all others go.

        It outlives a power cut: whoever hears of the round may count on it.
        """
        folder, stays = self.folder / job.client, self.counted(job)[-1:]
        for path in folder.glob(".*"):  # half written, by a process that was killed
            path.unlink()
        earlier = self.versions(job.client)
        write_tensors(folder / f"{job.key}.safetensors", client_state)
        sync(folder)
        for path in earlier:
            if path not in stays and path.stem != job.key:
                path.unlink()

    def counted(self, job: Job) -> list[Path]:
        """The versions that the server counts on, or did; the newest last. Later ones are of answers that it did not merge."""
        return [path for path in self.versions(job.client) if path.stem <= job.accepted and path.stem != job.key]

    def drop_newer(self, client: str, last: str) -> None:
        """Removes what `client` kept after the job whose key is `last`; all, where that is empty."""
        for path in self.versions(client):
            if path.stem > last:
                path.unlink()

    def versions(self, client: str) -> list[Path]:
        """Oldest first."""
        folder = self.folder / client
        return sorted(path for path in folder.iterdir() if path.name[0].isdigit()) if folder.is_dir() else []
