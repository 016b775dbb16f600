"""Federated fine-tuning of Mixture-of-Experts language models.

    run(run_file, out)                      one run, into a results folder
    compare(run_file, methods, seeds, out=) several methods over the same data and clients
    results(folder)                         what runs wrote, as pandas DataFrames
    load(folder)                            a model that `fedexperts export` wrote
    Method                                  what a federated method is: a base class for your own
    METHODS                                 the methods by name; one of your own is entered here
    partition                               who gets which examples: iid, dirichlet, pathological, quantity, by_task, …

Everything is imported when it is first asked for, so `import fedexperts` itself is quick.
"""

import logging
import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedexperts.api import compare, run
    from fedexperts.data import partition
    from fedexperts.export import load
    from fedexperts.methods import METHODS
    from fedexperts.methods.contract import Method
    from fedexperts.report.results import results

# oneDNN, which multiplies in bfloat16 on a CPU, compiles a kernel for each shape and keeps 1,024 of them. The number of tokens
# of an expert changes with every batch, so a step of an MoE needs several thousand, and would compile them again in each step.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")

__all__ = ["METHODS", "Method", "__version__", "compare", "load", "partition", "results", "run"]
__version__ = version("fedexperts")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns that kernels are missing that we do not use

_WHERE = {
    "METHODS": "fedexperts.methods",
    "Method": "fedexperts.methods.contract",
    "compare": "fedexperts.api",
    "load": "fedexperts.export",
    "results": "fedexperts.report.results",
    "run": "fedexperts.api",
}


def __getattr__(name: str) -> object:
    if name == "partition":
        return import_module("fedexperts.data.partition")
    if name not in _WHERE:
        raise AttributeError(f"module 'fedexperts' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
