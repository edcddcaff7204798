"""The layers themselves: a module of the base wrapped in what a method computes beside it.

x is `(batch, tokens, width)`; down is `(bottleneck, width)`, up `(width, bottleneck)`, σ the activation, s the scale.
Every layer is made so that it changes nothing at first: up is zero, a scale is one and a shift is zero. A layer
computes from its arguments alone, so it may be called twice, in any order, and again while gradients are recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import gelu, linear, relu, silu

from fedpeft.errors import ModelError, sentence

PREFIX = "fedpeft_"
"""What the name of each method's own submodule begins with; no module of a base is called so."""

FIRST = f"{PREFIX}first_"
"""What the name of the buffer begins with that keeps the first value of a parameter that a method trains."""

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": relu, "gelu": gelu, "silu": silu}
"""What a bottleneck may compute between its projections."""


class Projection(nn.Module):
    """A linear layer that is no `nn.Linear`, so that peft's "all-linear" puts no adapter onto an adapter."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W x + b."""
        return linear(x, self.weight, self.bias)


class Bottleneck(nn.Module):
    """A small network, zero at first. The first weight of down is drawn from torch's global generator.

    Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1. They draw both
    projections near zero; here they begin as LoRA's factors do, Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large
    Language Models", as peft draws them: down as Kaiming's uniform, up at zero.
    """

    def __init__(self, inputs: int, outputs: int, size: int, scale: float, activation: str) -> None:
        super().__init__()
        down = nn.init.kaiming_uniform_(torch.empty(size, inputs), a=math.sqrt(5))
        self.down, self.up = Projection(down), Projection(torch.zeros(outputs, size))
        self.scale, self.activation = scale, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The change: s up(σ(down(x)))."""
        hidden = ACTIVATIONS[self.activation](self.down(x.to(self.down.weight.dtype)))
        change: torch.Tensor = self.scale * self.up(hidden)
        return change


class Scaling(nn.Module):
    """A scale and a shift for each feature, the identity at first.

    `trailing` axes come after that of the `width` features: none for a linear layer, two for a convolution.
    """

    def __init__(self, width: int, trailing: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.trailing = trailing

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Scale ⊙ h + shift."""
        shape = (-1, *[1] * self.trailing)
        return (h * self.scale.view(shape) + self.shift.view(shape)).to(h.dtype)


class Vectors(nn.Module):
    """Vectors `(tokens, width)` that stand among those of an image's patches, drawn from torch's global generator.

    Source: Jia et al. 2022, "Visual Prompt Tuning", section 3.2 (VPT-shallow), which draws them uniformly in
    ±√(6 / (3 patch² + width)).
    """

    def __init__(self, tokens: int, width: int, patch: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (3 * patch**2 + width))
        self.vectors = nn.Parameter(nn.init.uniform_(torch.empty(tokens, width), -bound, bound))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """What an image begins with, the vectors, and its patches: `(batch, 1 + tokens + patches, width)`."""
        vectors = self.vectors.to(h.dtype).expand(len(h), -1, -1)
        return torch.cat([h[:, :1], vectors, h[:, 1:]], dim=1)


class OwnLayer(nn.Module):
    """A module of the base as `base_layer`, and beside it a method's own submodule, `fedpeft_<method>`.

    While `off`, it is the base's module. What it does not have itself, it reads from the base's module, as
    transformers does of some. `reads_input` says that its own submodule reads what the base's module reads.
    """

    reads_input: ClassVar[bool] = False

    def __init__(self, base_layer: nn.Module, method: str, own: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.method, self.off = base_layer, method, False
        like = next(base_layer.parameters(), torch.zeros(()))
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
        self.add_module(f"{PREFIX}{method}", own.to(like.device, dtype))

    @property
    def own(self) -> nn.Module:
        """The method's own submodule."""
        return self.get_submodule(f"{PREFIX}{self.method}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `adapted` makes of what comes in, or while off, the base's module."""
        return (self.base_layer if self.off else self.adapted)(*args, **kwargs)

    def adapted(self, *args: Any, **kwargs: Any) -> Any:
        """What the method makes of the base's module."""
        raise NotImplementedError

    def unload_and_optionally_merge_module(self, **_: Any) -> OwnLayer:
        """What peft leaves here when it unloads its own adapters, which it looks for in whatever has a `base_layer`."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)


class Rooted(nn.Module):
    """A module of a method that stands at the root of the base, and reaches into others from there."""


class Serial(OwnLayer):
    """An adapter that reads and changes what a module makes."""

    def adapted(self, *args: Any, **kwargs: Any) -> Any:
        """What the base's module makes, h, as h + adapter(h)."""
        output = self.base_layer(*args, **kwargs)
        return _plus(output, self.own(_leading(output)))


class Parallel(OwnLayer):
    """An adapter beside a module, or beside a network."""

    reads_input = True

    def adapted(self, *args: Any, **kwargs: Any) -> Any:
        """base(x) + adapter(x)."""
        x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        return _plus(self.base_layer(*args, **kwargs), self.own(x))


class ParallelTail(OwnLayer):
    """An adapter beside a network that has no module of its own, on the module that closes it.

    BERT's `output` projects the hidden units h back, adds the network's input x and normalises the sum, so what is
    added to x is what a parallel adapter adds to the network's output.
    """

    def adapted(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> Any:
        """base(h, x + adapter(x))."""
        return self.base_layer(hidden_states, _plus(input_tensor, self.own(input_tensor)))


class BeforeNorm(OwnLayer):
    """An adapter that reads a sub-layer's output after the base's norm, and changes it before."""

    def adapted(self, z: torch.Tensor) -> Any:
        """LN(z + adapter(LN(z))), where z is a sub-layer's output and its input, added, and LN the base's norm."""
        return self.base_layer(_plus(z, self.own(self.base_layer(z))))


class Scaled(OwnLayer):
    """A scale and a shift for each feature that a module makes."""

    def adapted(self, *args: Any, **kwargs: Any) -> Any:
        """Scale ⊙ base(x) + shift."""
        return self.own(self.base_layer(*args, **kwargs))


class Prompted(OwnLayer):
    """Vectors behind the first of those that a base's embeddings make of an image."""

    def adapted(self, *args: Any, **kwargs: Any) -> Any:
        """What the base's embeddings make, with the vectors in it."""
        return self.own(self.base_layer(*args, **kwargs))


def innermost(module: nn.Module) -> nn.Module:
    """The base's module under any layers of ours."""
    while isinstance(module, OwnLayer):
        module = module.base_layer
    return module


def width_into(module: nn.Module, place: str) -> int:
    """How many features a module of the base takes, which for a network is what its first layer takes.

    Raises:
        ModelError: nothing in it says so.
    """
    return _width(module, innermost(module).modules(), ("in_features", "nx", "in_channels", "normalized_shape"), place)


def width_out_of(module: nn.Module, place: str) -> int:
    """How many features a module of the base makes, which for a network is what its last layer makes.

    Raises:
        ModelError: nothing in it says so.
    """
    inner = reversed(list(innermost(module).modules()))
    return _width(module, inner, ("out_features", "nf", "out_channels", "normalized_shape"), place)


def own_layers(model: nn.Module) -> dict[str, OwnLayer]:
    """The layers of ours in `model`, outer ones first, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, OwnLayer)}


def claims(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The parameters of the base that a method trains: the module that holds each, and its name there."""
    found = []
    for module in model.modules():
        found += [(module, name.removeprefix(FIRST)) for name in module._buffers if name.startswith(FIRST)]
    return found


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The methods' own parameters, by full name in `model`, in its order."""
    own = {id(parameter) for layer in own_layers(model).values() for parameter in layer.own.parameters()}
    own |= {id(module.get_parameter(name)) for module, name in claims(model)}
    rooted = (module for module in model.modules() if isinstance(module, Rooted))
    own |= {id(parameter) for module in rooted for parameter in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def base_of(model: Any) -> nn.Module:
    """The base that an adapter of peft's is on; `model` itself where there is none."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def canonical(name: str) -> str:
    """The name in the base of what is called `name` in a base with modules that are wrapped."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """The module at `path` of `model` is `module` from now on."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _leading(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _plus(output: Any, change: torch.Tensor) -> Any:
    """`output`, or the first of it where it is a tuple, with `change` added at the precision that it has."""
    first = _leading(output)
    total = first + change.to(first.dtype)
    return (total, *output[1:]) if isinstance(output, tuple) else total


def _width(module: nn.Module, inner: Iterable[nn.Module], names: tuple[str, ...], place: str) -> int:
    for one in inner:
        width: Any = next((getattr(one, name) for name in names if hasattr(one, name)), None)
        if width is not None:
            return int(width[-1] if isinstance(width, tuple) else width)
    raise ModelError(
        sentence(
            place,
            expected="a module with linear layers in it",
            found=type(innermost(module)).__name__,
            remedy="name others in target_modules",
        )
    )
