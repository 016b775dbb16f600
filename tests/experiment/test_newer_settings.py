"""Settings that came after the first runs: a run that began without them goes on."""

from fedexperts.config import RunConfig
from fedexperts.experiment.runner import BEFORE, MAY_DIFFER
from fedexperts.io.toml import checked, different, flattened

FIRST = [
    "seed",
    "model.name",
    "model.trust_remote_code",
    "method.name",
    "training.train",
    "training.rank",
    "training.alpha",
    "training.attention_modules",
    "training.lr",
    "training.batch_size",
    "training.local_steps",
    "training.optimizer",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.label_smoothing",
    "training.router_aux_loss_coef",
    "training.validation_examples",
    "training.threads",
    "federation.rounds",
    "federation.sampling",
    "federation.engine",
    "data.sources",
    "data.clients",
    "data.partition.by",
    "data.partition.alpha",
    "data.partition.labels_per_client",
    "data.partition.clusters",
    "data.minimum",
    "data.validation",
    "data.test_examples",
    "data.max_tokens",
    "evaluation.every",
    "evaluation.generate_tokens",
    "evaluation.batch_size",
    "evaluation.split",
]
"""Settings that runs have had from the beginning."""


def test_a_run_that_began_before_a_setting_existed_had_its_default():
    tree = {"model": {"name": "tiny"}, "method": {"name": "fedavg"}, "data": {"sources": ["synthetic/sort"], "clients": 2}}
    resolved = checked(RunConfig, tree).resolved()
    begun = {**BEFORE, **{name: value for name, value in flattened(resolved).items() if name in FIRST}}
    changed = set(different(begun, resolved)) - {*MAY_DIFFER}
    assert changed == {"devices.out_of_memory"}  # then a client trained anyway, and now it fails
