"""A text classifier that reads the first position of its last layer has that layer compute no other.

What other positions would come to there is read by nobody, so neither the loss nor its gradients change. Their keys and
values are computed as ever, as the first position attends to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_LAYERS: Mapping[str, str] = {
    "BertForSequenceClassification": "bert.encoder.layer",
    "ElectraForSequenceClassification": "electra.encoder.layer",
    "RobertaForSequenceClassification": "roberta.encoder.layer",
    "XLMRobertaForSequenceClassification": "roberta.encoder.layer",
}
"""Where the classifiers of transformers that read the first position alone have their layers, by class."""


@contextlib.contextmanager
def first_alone(model: nn.Module) -> Iterator[None]:
    """Inside, what follows attention in the last layer is computed for the first position alone, where that serves."""
    with contextlib.ExitStack() as undone:
        for module in model.modules():
            if type(module).__name__ in _LAYERS:
                last: Any = module.get_submodule(_LAYERS[type(module).__name__])[-1]  # type: ignore[index]
                undone.callback(last.attention.output.register_forward_pre_hook(_first).remove)
        yield


def _first(module: nn.Module, given: Any) -> Any:  # noqa: ARG001
    """Of attention's answer and what is added to it, `(rows, positions, width)` each, the first position."""
    return tuple(one[:, :1] for one in given)
