"""The federated methods, by their name in run files."""

from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import entry_points

from fedexperts.errors import BadValue
from fedexperts.methods.centralized import Centralized
from fedexperts.methods.contract import Method
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
    "centralized": Centralized,
}

FORMER_NAMES = {"centralised": "centralized"}
"""Former name of a method → its name now."""

FORMER_FIELDS = {"fedmoe": {"neighbours": "neighbors"}}
"""Method → former name of a hyperparameter → its name now."""

GROUP = "fedexperts.methods"
"""The entry point group for methods of installed packages: `median = "its_module:Median"`."""


@cache
def enter_installed() -> None:
    """Adds the methods of installed packages to METHODS, once per process.

    Raises:
        BadValue: a method cannot be imported, is not a Method, or has the name of another.
    """
    methods: dict[str, type[Method]] = {}
    for point in entry_points(group=GROUP):
        where = f"the method {point.name!r} of the installed package {point.dist.name if point.dist else point.value}"
        remedy = "repair that package or uninstall it"
        taken = {**METHODS, **methods}.get(point.name)
        try:
            loaded = point.load()
        except Exception as error:  # importing it may raise anything
            raise BadValue(f"{where} cannot be imported ({type(error).__name__}: {error}); {remedy}") from error
        if taken not in (None, loaded):  # a module may also register its own method under the same name
            raise BadValue(f"{where} has the name of another; {remedy}")
        if not (isinstance(loaded, type) and issubclass(loaded, Method) and is_dataclass(loaded)):
            raise BadValue(f"{where} is no method: a method is a frozen dataclass below fedexperts.Method; {remedy}")
        methods[point.name] = loaded
    METHODS.update(methods)
