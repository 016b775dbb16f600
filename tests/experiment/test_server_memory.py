"""Memory of the server process if clients run elsewhere: it has the weights once."""

import gc
from contextlib import contextmanager

import torch

from fedexperts.config import RunConfig
from fedexperts.experiment import runner
from fedexperts.io.toml import checked
from fedexperts.types import Patch, Update

RUN = {
    "model": {"name": "tiny"},
    "method": {"name": "fedavg"},
    "training": {"train": "full"},
    "federation": {"rounds": 2},
    "data": {"sources": ["synthetic/double"], "clients": 2, "limit": 60, "test_examples": 4},
    "evaluation": {"score": "before_aggregation"},
}


SCORED = {"metric": "verbatim", "examples": 4, "sums": {"verbatim": 1.0}, "labels": {}, "nll": 1.0, "tokens": 8}
SCORES = {"scores": {"double": SCORED}}


class Elsewhere:
    """Answers what it was sent, and notes how many bytes of tensors there are in this process at each job."""

    def __init__(self):
        self.held = {}

    def run(self, jobs):
        for job in jobs:
            self.held.setdefault(job.round, tensor_bytes())
            if job.task == "train":
                patch = Patch({name: tensor + 1 for name, tensor in job.patch.tensors.items()}, job.patch.rows)
                yield Update(job.client, job.round, job.task, patch, 26, metrics=SCORES if job.round == 2 else {})
                del patch
            else:
                yield Update(job.client, job.round, job.task, Patch({}), 26, metrics=SCORES)


def tensor_bytes():
    gc.collect()
    tensors = (
        each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu"
    )
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_a_server_frees_the_base_and_the_weights_of_the_previous_round(tmp_path):
    engine, before = Elsewhere(), tensor_bytes()

    @contextmanager
    def connected(prepared, out):
        engine.size = sum(tensor.nbytes for tensor in prepared.server.weights.values())
        del prepared
        yield engine

    runner.run(checked(RunConfig, RUN), tmp_path / "run", engine=connected)
    sizes = {round: (bytes - before) / engine.size for round, bytes in engine.held.items()}
    assert sizes.keys() == {0, 1, 2}
    assert max(sizes.values()) < 1.1, sizes
