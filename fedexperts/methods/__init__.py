"""The federated methods, by the name that a run file calls them."""

from fedexperts.methods.centralised import Centralised
from fedexperts.methods.ditto import Ditto
from fedexperts.methods.fedavg import FedAvg
from fedexperts.methods.fedit import FedIT
from fedexperts.methods.fedmoe import FedMoE
from fedexperts.methods.fedper import FedPer
from fedexperts.methods.fedprox import FedProx
from fedexperts.methods.fedrep import FedRep
from fedexperts.methods.fedsa_lora import FedSALoRA
from fedexperts.methods.ffa_lora import FFALoRA
from fedexperts.methods.flex import FLEx
from fedexperts.methods.flexlora import FlexLoRA
from fedexperts.methods.flora import FLoRA
from fedexperts.methods.hetlora import HetLoRA
from fedexperts.methods.hfedmoe import HFedMoE
from fedexperts.methods.local import Local
from fedexperts.methods.pfl_moe import PFLMoE
from fedexperts.methods.random_expert import RandomExpert
from fedexperts.methods.random_moe import RandomMoE
from fedexperts.methods.scaffold import Scaffold
from fedexperts.methods.seer_moe import SEERMoE
from fedexperts.types import Method

METHODS: dict[str, type[Method]] = {
    "fedmoe": FedMoE,
    "hfedmoe": HFedMoE,
    "flex": FLEx,
    "pfl_moe": PFLMoE,
    "seer_moe": SEERMoE,
    "random_moe": RandomMoE,
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedit": FedIT,
    "ffa_lora": FFALoRA,
    "fedsa_lora": FedSALoRA,
    "flora": FLoRA,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
    "random_expert": RandomExpert,
    "fedper": FedPer,
    "fedrep": FedRep,
    "ditto": Ditto,
    "local": Local,
    "centralised": Centralised,
}

REFERENCES = frozenset({"local", "centralised"})
"""What federated methods are held against, the floor and the ceiling: no method's target is theirs."""
