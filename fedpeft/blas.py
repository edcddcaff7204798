"""NumPy's BLAS lets go of the processor soon after a product; imported before NumPy is.

OpenBLAS keeps the threads that it multiplied with going for 2^26 ticks of the processor's clock, some 30 milliseconds,
in case another product follows. After every merge of a round they took a core from the workers that train. 2^20 ticks
are enough for a merge's own products. What the environment says already stays.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
