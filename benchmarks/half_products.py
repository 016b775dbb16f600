"""Products in bfloat16 of a few rows and an expert's matrix, by rows and transposed: milliseconds of CPU time, one thread.

    python benchmarks/half_products.py

By rows is what backward of frozen experts computes, transposed what forward does. Also says whether oneDNN has kernels for
bfloat16 on this CPU.
"""

import time
from collections.abc import Callable

import torch

REPEATS = 5


def milliseconds(function: Callable[[], object]) -> float:
    function()
    started = time.process_time()
    for _ in range(REPEATS):
        function()
    return (time.process_time() - started) / REPEATS * 1e3


def main() -> None:
    torch.set_num_threads(1)
    print(f"{torch.backends.cpu.get_cpu_capability()}, kernels of oneDNN: {torch.ops.mkldnn._is_mkldnn_bf16_supported()}")
    matrix = torch.randn(1024, 2048).bfloat16()
    for rows in (1, 8, 20):
        x, y = torch.randn(rows, 1024).bfloat16(), torch.randn(rows, 2048).bfloat16()
        figures = (lambda x=x: x @ matrix, lambda y=y: y @ matrix.t(), lambda: matrix.t().contiguous())
        by_rows, transposed, copy = map(milliseconds, figures)
        print(f"{rows:3} rows: by rows {by_rows:.1f}, transposed {transposed:.1f}, copy of the matrix {copy:.1f}")


if __name__ == "__main__":
    main()
