"""Modules whose adapter travels in other numbers than those that are trained, in which a mean means more.

DoRA trains a magnitude m beside B and A; what travels is g = m / ‖W + s B A‖, row by row, and diag(g) s B: the weight
is diag(g) W + (diag(g) s B) A, so the mean of g is exact and the rest is a LoRA. RoAd trains an angle and a length;
what travels are their cosine and sine parts. P-tuning and projected prefixes train an encoder; what travels are the
vectors that it makes, and at each node the encoder begins anew and its change is added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from fedpeft.errors import ModelError, sentence

Values = Mapping[str, torch.Tensor]
"""A module's tensors by name."""

_TINY = 1e-12
"""The least number that is divided by."""


@dataclass(frozen=True)
class Coordinates:
    """How a module's tensors, by name, come from its parameters and go back into them.

    `parameters` are what is trained for each tensor; `rescaled` says that a module's scale is already in them.
    """

    parameters: Mapping[str, tuple[nn.Parameter, ...]]
    read: Callable[[], Values]
    write: Callable[[Values], None]


def dora(layer: Any, parameters: Mapping[str, nn.Parameter], place: str) -> Coordinates:
    """G `(out,)`, A `(rank, in)` and diag(g) s B `(out, rank)` of a linear layer.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5.

    Raises:
        ModelError: the layer is not linear.
    """
    base = layer.get_base_layer()
    if getattr(base, "weight", None) is None or base.weight.ndim != 2 or isinstance(base, nn.Embedding):
        raise ModelError(
            sentence(
                "adapter.lora.dora",
                expected="linear layers",
                found=f"{type(base).__name__} at {place}",
                remedy="name other target_modules",
            )
        )
    a, b, m = parameters["A"], parameters["B"], parameters["m"]
    scale = float(layer.scaling["default"])

    def rows(change: torch.Tensor) -> torch.Tensor:
        weight = dequantize_module_weight(base).float()
        whole = (weight.T if layer.fan_in_fan_out else weight) + change
        sizes: torch.Tensor = torch.linalg.norm(whole, dim=1)
        return sizes

    def read() -> Values:
        g = m.float() / rows(scale * (b.float() @ a.float())).clamp_min(_TINY)
        return {"A": a.float(), "B": (g * scale)[:, None] * b.float(), "g": g}

    def write(values: Values) -> None:
        g = values["g"]
        safe = torch.where(g.abs() < _TINY, torch.full_like(g, _TINY), g)
        change = values["B"] / safe[:, None]
        put(a, values["A"])
        put(b, change / scale)
        put(m, g * rows(change @ values["A"]))

    return Coordinates({"A": (a,), "B": (b,), "g": (m,)}, read, write)


def road(layer: Any, parameters: Mapping[str, nn.Parameter], place: str) -> Coordinates:  # noqa: ARG001
    """Cosine = α cos θ and sine = α sin θ, of the shape of θ and α.

    Source: Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
    Composability", eq. 4.
    """
    theta, alpha = parameters["theta"], parameters["alpha"]

    def read() -> Values:
        return {"cosine": alpha.float() * theta.float().cos(), "sine": alpha.float() * theta.float().sin()}

    def write(values: Values) -> None:
        put(alpha, torch.hypot(values["cosine"], values["sine"]))
        put(theta, torch.atan2(values["sine"], values["cosine"]))

    return Coordinates({"cosine": (theta, alpha), "sine": ()}, read, write)


def encoded(layer: Any, parameters: Mapping[str, nn.Parameter], place: str) -> Coordinates:  # noqa: ARG001
    """The vectors `(tokens, size)` that an `Encoded` prompt makes.

    Source: Liu et al. 2021, "GPT Understands, Too", section 3.2; Li and Liang 2021, "Prefix-Tuning: Optimizing
    Continuous Prompts for Generation", section 4.3.
    """
    trained = tuple(layer.encoder.parameters())
    return Coordinates(
        {"embedding": trained}, lambda: {"embedding": layer.vectors()}, lambda v: layer.restart(v["embedding"])
    )


COORDINATES: Mapping[str, Callable[[Any, Mapping[str, nn.Parameter], str], Coordinates]] = {
    "dora": dora,
    "road": road,
    "encoded": encoded,
}
"""The kinds of modules that travel in coordinates of their own."""


class Encoded(nn.Module):
    """A prompt whose vectors are those that were given, moved by what the encoder has changed since it began.

    The encoder begins at the numbers that it has here. `forward(ids)` is `(batch, tokens, size)`.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self._first = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
        start = self._made().detach()
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("given", start.clone(), persistent=False)

    @property
    def embedding(self) -> nn.Module:
        """The encoder's own table, of which peft asks the device."""
        table: nn.Module = self.encoder.embedding
        return table

    def vectors(self) -> torch.Tensor:
        """The vectors now, `(tokens, size)`."""
        given: torch.Tensor = self.given
        return given + (self._made() - self.start)

    def restart(self, given: torch.Tensor) -> None:
        """The vectors are `given`, and the encoder begins anew."""
        own = self.encoder.state_dict()
        for name, value in self._first.items():
            own[name].copy_(value)
        table: Any = self.embedding
        self.given: torch.Tensor = given.to(table.weight.device, table.weight.dtype)
        self.start: torch.Tensor = self._made().detach()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors of the slots `ids`."""
        return self.vectors()[ids]

    def _made(self) -> torch.Tensor:
        table = self.encoder.embedding
        made: torch.Tensor = self.encoder(torch.arange(table.num_embeddings, device=table.weight.device)[None])[0]
        return made


def encode_prompts(model: Any) -> None:
    """The prompt encoder of a peft model adds to vectors that can be given to it."""
    model.prompt_encoder["default"] = Encoded(model.prompt_encoder["default"])


def put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """The parameter holds `value`, which may be of another rank than what it held."""
    if parameter.shape == value.shape:
        parameter.data.copy_(value)
    else:
        parameter.grad = None
        parameter.data = value.to(parameter.device, parameter.dtype)
