"""The federated methods, by the name that a run file calls them."""

from fedexperts.methods.centralised import Centralised
from fedexperts.methods.ditto import Ditto
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.fedmoe import FedMoE
from fedexperts.methods.fedper import FedPer
from fedexperts.methods.fedprox import FedProx
from fedexperts.methods.fedrep import FedRep
from fedexperts.methods.hfedmoe import HFedMoE
from fedexperts.methods.local import Local
from fedexperts.methods.pfl_moe import PFLMoE
from fedexperts.methods.random_moe import RandomMoE
from fedexperts.methods.scaffold import Scaffold
from fedexperts.methods.seer_moe import SEERMoE
from fedexperts.types import Method

METHODS: dict[str, type[Method]] = {
    "fedmoe": FedMoE,
    "hfedmoe": HFedMoE,
    "pfl_moe": PFLMoE,
    "seer_moe": SEERMoE,
    "random_moe": RandomMoE,
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedper": FedPer,
    "fedrep": FedRep,
    "ditto": Ditto,
    "local": Local,
    "centralised": Centralised,
}

REFERENCES = frozenset({"local", "centralised"})
"""What federated methods are held against, the floor and the ceiling: no method's target is theirs."""
