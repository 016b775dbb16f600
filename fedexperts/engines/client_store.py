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

    A job reads the newest version that an earlier one wrote. So a round that is done again after a kill starts from the
    same state as the first time, whatever it had written by then.
    """

    folder: Path

    def load(self, job: Job) -> dict[str, Tensor]:
        earlier = [path for path in self.versions(job.client) if key(job.round, "~") >= path.stem and path.stem != own(job)]
        return load_file(earlier[-1]) if earlier else {}

    def save(self, job: Job, kept: Mapping[str, Tensor]) -> None:
        """A new version; the one before stays, in case this round is done again, and older ones go.

        It outlives a power cut: whoever hears of the round may count on it.
        """
        earlier, folder = [path for path in self.versions(job.client) if path.stem < own(job)], self.folder / job.client
        for path in folder.glob(".*"):  # half written, by a process that was killed
            path.unlink()
        write_tensors(folder / f"{own(job)}.safetensors", kept)
        sync(folder)
        for path in earlier[:-1]:
            path.unlink()

    def drop_after(self, round: int) -> None:
        """Removes what rounds after `round` wrote: they will be done again."""
        for client in self.folder.iterdir() if self.folder.is_dir() else ():
            self.drop_newer(client.name, key(round, "~"))

    def drop_newer(self, client: str, last: str) -> None:
        """Removes what `client` kept after the job whose key is `last`; all, where that is empty."""
        for path in self.versions(client):
            if path.stem > last:
                path.unlink()

    def versions(self, client: str) -> list[Path]:
        """Oldest first."""
        folder = self.folder / client
        return sorted(path for path in folder.iterdir() if path.name[0].isdigit()) if folder.is_dir() else []


def own(job: Job) -> str:
    return key(job.round, job.task)


def key(round: int, task: str) -> str:
    return f"{round:06d}-{task}"
