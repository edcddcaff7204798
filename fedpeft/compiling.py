"""The model as `torch.compile` makes it, while clients train one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from fedpeft.errors import PlanError, sentence
from fedpeft.replacing import replaced

_MOST_CHARACTERS = 200


@contextlib.contextmanager
def compiled(model: Any, backend: str) -> Iterator[None]:
    """Inside, calls of `model` are compiled by `backend` of torch's, for batches of any size.

    What was compiled stays with the process, and is taken up again the next time.

    Raises:
        PlanError: it cannot be compiled, or nothing here compiles it.
    """
    made = torch.compile(model._call_impl, backend=backend, dynamic=True)
    try:
        with replaced(model, "_compiled_call_impl", made):
            yield
    except TorchDynamoException as error:
        found = " ".join(str(error).split())[:_MOST_CHARACTERS]
        remedy = 'set training.compiled = "", or install a C++ compiler if that is what it lacks'
        raise PlanError(
            sentence("training.compiled", expected="a model that torch.compile serves here", found=found, remedy=remedy)
        ) from error
