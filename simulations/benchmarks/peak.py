"""How much of a machine's arithmetic goes into training: operations that a step needs, over what matmuls reach.

Counted are the multiplications and additions of matrix products (two operations for each pair of numbers) that a plain
PyTorch step runs, forward and backward, as `torch.utils.flop_counter` sees them: below the lowest adapter nothing goes
backward, and no gradient of a frozen weight is formed. Padding within a batch is counted, as in the plain step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedpeft.config import RunConfig
from fedpeft.experiment import adapted_model
from fedpeft.frozen_products import is_there, product
from fedpeft.training import use_threads
from simulations.benchmarks.overhead import bare_round

SIZES = ((256, 256, 256), (512, 512, 512), (1024, 384, 1536), (2048, 2048, 2048), (512, 4096, 512))
"""Rows, inner side and columns of the products whose fastest is taken for the peak: one as in a small transformer."""

_SECONDS = 0.5


def operations(config: RunConfig, clients: int) -> int:
    """Operations of one round of the first clients' local steps."""
    with FlopCounterMode(display=False) as counter:
        bare_round(config, adapted_model(config), range(clients))
    return int(counter.get_total_flops())


def peak(threads: int) -> float:
    """Operations a second of the fastest of `SIZES`, float32, by BLAS or oneDNN, on so many threads."""
    use_threads(threads)
    return max(_rate(*size) for size in SIZES)


def _rate(rows: int, inner: int, columns: int) -> float:
    one, other = torch.randn(rows, inner), torch.randn(columns, inner)
    ways: list[Callable[[], object]] = [lambda: torch.mm(one, other.t())]
    if is_there():
        ways.append(lambda: product(one, other, None))
    least, until = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        for way in ways:
            started = time.perf_counter()
            way()
            least = min(least, time.perf_counter() - started)
    return 2.0 * rows * inner * columns / least
