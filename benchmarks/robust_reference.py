"""Our robust rules against ByzFL's (https://github.com/LPD-EPFL/byzfl) on updates of full size.

    pip install --no-deps --target FOLDER byzfl
    python benchmarks/robust_reference.py FOLDER [--elements 10687680] [--clients 10]

One update of as many elements as the base `small` for each client: normal noise around a common change; two of ten have ten times
the change with its sign flipped. Lines have the largest difference of an element over the root mean square of ByzFL's result, and
CPU seconds. ByzFL's geometric median is smoothed by `nu`, here 1e-6, and gets 1,000 steps.
"""

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fedexperts.methods.robust import RULES


def byzfl_rules(folder: Path, faulty: int) -> dict[str, Any]:
    """ByzFL's aggregators, without its package, which imports torchvision."""
    package = ModuleType("byzfl")
    package.__path__ = [str(folder / "byzfl")]
    sys.modules["byzfl"] = package
    from byzfl.aggregators import aggregators  # type: ignore[import-not-found]

    return {
        "trimmed_mean": aggregators.TrMean(f=faulty),
        "median": aggregators.Median(),
        "krum": aggregators.Krum(f=faulty),
        "multi_krum": aggregators.MultiKrum(f=faulty),
        "geometric_median": aggregators.GeometricMedian(nu=1e-6, T=1000),
    }


def timed(function: Any, *arguments: Any) -> tuple[torch.Tensor, float]:
    started = time.process_time()
    return function(*arguments), time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--elements", type=int, default=10_687_680)
    parser.add_argument("--clients", type=int, default=10)
    options = parser.parse_args()
    faulty = options.clients // 5
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(options.elements, generator=generator, dtype=torch.float64)
    updates = torch.stack(
        [common + torch.randn(common.shape, generator=generator, dtype=torch.float64) for _ in range(options.clients)]
    )
    updates[:faulty] = -10 * common
    for name, reference in byzfl_rules(options.folder, faulty).items():
        ours, seconds = timed(lambda name=name: RULES[name](updates[:, None, :], faulty)[0])
        theirs, their_seconds = timed(reference, updates)
        difference = float((ours - theirs).abs().max() / theirs.square().mean().sqrt())
        print(f"{name:17} largest difference {difference:.1e}   CPU s: ours {seconds:.1f}, ByzFL {their_seconds:.1f}", flush=True)


if __name__ == "__main__":
    main()
