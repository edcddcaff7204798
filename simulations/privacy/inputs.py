"""What the first adapted layers of a base read of each word of its vocabulary: anybody can compute that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpeft.adapters import AdapterState
from fedpeft.errors import PlanError, sentence
from fedpeft.models import AdaptedModel, install

_BATCH = 4096
_WORD = 5
"""A word of any vocabulary, with the two after it."""

_RIDGE = 0.03
"""What is added to every second moment, over their mean: directions that hardly any word has are not blown up."""

_SAME = 1e-5
"""How far an input may be from itself, over its length, when another word stands beside it."""


class _Reached(Exception):
    """The layers that are asked about have been reached, so the rest need not be computed."""


@dataclass(frozen=True)
class Inputs:
    """What low-rank modules that all read the same thing read of a word, whatever stands beside it.

    `paths` are those modules. `at(position)` is what they read of each of the `words` there, `(words, in)`, float32; a
    base that does not tell positions apart at that place has one position alone.
    """

    paths: tuple[str, ...]
    words: int
    positions: int
    at: Callable[[int], np.ndarray]

    def whitening(self) -> np.ndarray:
        """L `(in, in)` under which inputs x L have second moments near the identity, so that no direction is common."""
        sample = self.at(0)
        values, vectors = np.linalg.eigh(sample.T.astype(np.float64) @ sample / len(sample))
        found: np.ndarray = (vectors / np.sqrt(np.maximum(values, 0) + _RIDGE * values.mean())).astype(np.float32)
        return found


def first_inputs(adapted: AdaptedModel, adapter: AdapterState, positions: int) -> Inputs:
    """The inputs of the modules that see each word alone, at the first `positions` positions.

    Raises:
        PlanError: every adapted module reads what lower layers have made of the whole text.
    """
    install(adapted, adapter)
    low_rank = [m.path for m in adapter.spec.modules if {"A", "B"} <= {name for name, _ in m.shapes}]
    alone = _alone(adapted, low_rank)
    if not alone:
        raise PlanError(
            sentence(
                "inversion",
                expected="low-rank modules that read single words, those of the first layer's attention",
                found=f"{len(low_rank)} low-rank modules, each of which reads more",
                remedy="adapt the first layer, such as with --set adapter.lora.layers=0,1",
            )
        )
    embeddings: Any = adapted.model.get_input_embeddings()  # type: ignore[operator]
    words = int(embeddings.weight.shape[0])

    def at(position: int) -> np.ndarray:
        install(adapted, adapter)
        starts = range(0, words, _BATCH)
        blocks = [[[token] for token in range(start, min(words, start + _BATCH))] for start in starts]
        read = (_read(adapted, alone[:1], block, [[position]] * len(block))[0][:, 0] for block in blocks)
        return np.concatenate(list(read))

    told_apart = not _same(*(_read(adapted, alone[:1], [[_WORD]], [[at]])[0] for at in (0, 1)))
    return Inputs(tuple(alone), words, positions if told_apart else 1, at)


def _alone(adapted: AdaptedModel, paths: Sequence[str]) -> list[str]:
    """Those of `paths` that read a word whatever stands beside it, and the same thing as the first of them."""
    if not paths:
        return []
    word, other, third = _WORD, _WORD + 1, _WORD + 2
    texts, positions = [[word, other], [third, other], [word, third]], [[0, 1]] * 3
    found = _read(adapted, paths, texts, positions, stop=False)
    single = [at for at, seen in enumerate(found) if _same(seen[0, 1], seen[1, 1]) and _same(seen[0, 0], seen[2, 0])]
    return [paths[at] for at in single if _same(found[at], found[single[0]])]


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    return float(np.linalg.norm(one - other)) <= _SAME * float(np.linalg.norm(one))


def _read(
    adapted: AdaptedModel,
    paths: Sequence[str],
    tokens: list[list[int]],
    positions: list[list[int]],
    *,
    stop: bool = True,
) -> list[np.ndarray]:
    """What each of the modules reads of the texts, `(texts, tokens, in)` each."""
    seen: dict[str, np.ndarray] = {}

    def note(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:  # noqa: ARG001
            seen[path] = arguments[0].detach().float().cpu().numpy()
            if stop and len(seen) == len(paths):
                raise _Reached

        return hook

    hooks = [_module(adapted.model, path).register_forward_pre_hook(note(path)) for path in paths]
    ids = torch.tensor(tokens, device=adapted.device)
    adapted.model.eval()
    try:
        with torch.inference_mode():
            adapted.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.tensor(positions, device=adapted.device),
            )
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[path] for path in paths]


def _module(model: nn.Module, path: str) -> nn.Module:
    """The module that a specification calls `path`, whatever wraps the base."""
    found: nn.Module = next(module for name, module in model.named_modules() if f".{name}".endswith(f".{path}"))
    return found
