"""The exact mean through real models: adapters of unlike rank and scale on every kind of weight that peft adapts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from fedpeft.adapters import AdapterState, absorbed, at_rank, at_ranks, resized
from fedpeft.client import FitJob
from fedpeft.config.adapters import Lora
from fedpeft.config.tasks import SequenceClassification
from fedpeft.config.training import TrainingConfig
from fedpeft.models import AdaptedModel, extract, install, save_adapter
from fedpeft.tasks import Example, build_task
from fedpeft.training import TorchLearner
from fedpeft.updates import ServerState, Update
from tests import tiny
from tests.merges.harness import RUN, low_rank, method_of, product, strategy_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft says so of every model that keeps its weights transposed, and then does it.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    # peft asks transformers 5 for it under its old name.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

CLIENTS: tuple[dict[str, Any], ...] = (
    {"rank": 2, "alpha": 8.0},
    {"rank": 4, "alpha": 3.0, "rank_stabilised": True},
    {"rank": 3, "alpha": 5.0},
)
EXAMPLES = (3, 5, 2)
SHARES = tuple(count / sum(EXAMPLES) for count in EXAMPLES)
TOTAL_RANK = sum(client["rank"] for client in CLIENTS)
TEXTS = tuple(Example((2, 5 + at, 6 + at, 3), at % 3, "") for at in range(8))


@dataclass(frozen=True)
class Base:
    """A model and the weights of it that are adapted."""

    folder: Path
    targets: tuple[str, ...]

    def load(self, **settings: Any) -> AdaptedModel:
        return tiny.load(self.folder, Lora(target_modules=self.targets, **settings))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with the tokenizer of the tiny BERT."""
    folder = tiny.build(tmp_path_factory.mktemp("tiny-gpt2"))
    settings = transformers.GPT2Config(
        vocab_size=19, n_embd=16, n_head=2, n_layer=2, n_inner=24, n_positions=40, initializer_range=0.2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GPT2Model(settings).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module", params=["linear", "transposed", "embedding"])
def base(request: pytest.FixtureRequest, tiny_model: Path) -> Base:
    if request.param == "transposed":
        return Base(request.getfixturevalue("gpt2"), ("c_attn", "c_proj", "c_fc"))
    targets = {"linear": ("query", "value", "dense"), "embedding": ("word_embeddings", "position_embeddings", "key")}
    return Base(tiny_model, targets[request.param])


@pytest.fixture(scope="module")
def trained(base: Base) -> tuple[AdaptedModel, ...]:
    """A model for each client, with an adapter of its own rank and scale that does something."""
    found = []
    for seed, settings in enumerate(CLIENTS):
        adapted = base.load(**settings)
        install(adapted, tiny.moved(adapted.initial, seed))
        found.append(adapted)
    return tuple(found)


def merged(name: str, server: AdaptedModel, clients: tuple[AdaptedModel, ...], **settings: Any) -> AdapterState:
    """The server's adapter after a round in which the clients' adapters came back."""
    updates = []
    for adapted, examples in zip(clients, EXAMPLES, strict=True):
        state = extract(adapted)
        spec = at_ranks(server.spec, {module.path: module.rank for module in state.spec.modules})
        received = resized(server.initial.tensors, spec)
        delta = {key: state.tensors[key] - received[key] for key in spec.shapes}
        updates.append(Update(spec, delta, examples, examples))
    start = ServerState(RUN, 0, 0, server.initial)
    return strategy_of(method_of(name, **settings)).aggregate(start, iter(updates))[0].adapter


def dense_mean(clients: tuple[AdaptedModel, ...]) -> nn.Module:
    """The model whose weights are the mean of the clients' merged weights, which peft makes."""
    adapters: list[Any] = [copy.deepcopy(adapted.model) for adapted in clients]
    models: list[nn.Module] = [model.merge_and_unload() for model in adapters]
    weights = [model.state_dict() for model in models]
    mean = {
        key: sum(share * own[key].double() for share, own in zip(SHARES, weights, strict=True)).to(value.dtype)
        for key, value in weights[0].items()
    }
    models[0].load_state_dict(mean)
    return models[0]


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    gap, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert gap <= tolerance * size, f"logits differ by {gap:.3g} of {size:.3g}"


@pytest.mark.parametrize("name", ["flora", "fedex", "flexlora"])
def test_the_merged_adapter_computes_as_the_mean_of_the_weights(
    name: str, base: Base, trained: tuple[AdaptedModel, ...]
) -> None:
    # Only at the sum of the ranks does an adapter alone hold the mean.
    server = base.load(rank=TOTAL_RANK if name == "flexlora" else 4, alpha=6.0)
    after = merged(name, server, trained)
    expected = tiny.logits(dense_mean(trained))
    install(server, after)
    assert_same(tiny.logits(server.model), expected)
    install(server, absorbed(after))
    assert_same(tiny.logits(server.model), expected)


@pytest.mark.parametrize(("name", "least"), [("fedavg", 1e-2), ("zero_pad", 1e-2), ("hetlora", 1e-2)])
def test_the_mean_of_factors_does_not(name: str, least: float, base: Base, trained: tuple[AdaptedModel, ...]) -> None:
    server = base.load(rank=4, alpha=6.0)
    install(server, merged(name, server, trained))
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same(tiny.logits(server.model), tiny.logits(dense_mean(trained)), least)


def test_what_is_exported_is_the_mean_to_stock_peft(
    base: Base, trained: tuple[AdaptedModel, ...], tmp_path: Path
) -> None:
    server = base.load(rank=4, alpha=6.0)
    save_adapter(server, absorbed(merged("flora", server, trained)), tmp_path / "adapter")
    bare = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(base.folder), num_labels=3, pad_token_id=0
    )
    stock = peft.PeftModel.from_pretrained(bare, str(tmp_path / "adapter"))
    assert_same(tiny.logits(stock), tiny.logits(dense_mean(trained)))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_node_of_lower_rank_computes_with_the_leading_rows(base: Base, rank: int) -> None:
    server = base.load(rank=4, alpha=6.0)
    state = tiny.moved(server.initial)
    spec = at_rank(server.spec, rank)
    install(server, AdapterState(spec, resized(state.tensors, spec)))
    found = tiny.logits(server.model)
    silenced = dict(state.tensors)
    for module in low_rank(server.spec):
        silenced[f"{module.path}.A"] = np.where(np.arange(4)[:, None] < rank, silenced[f"{module.path}.A"], 0)
    install(server, AdapterState(server.spec, silenced))
    assert_same(found, tiny.logits(server.model))


def test_a_node_trains_what_it_computes_with(base: Base) -> None:
    """What a node of rank 2 sends back is the change of its weights, on a base with a residual beside it."""
    server = base.load(rank=4, alpha=6.0)
    residual = {
        key: value
        for key, value in tiny.moved(base.load(rank=1, alpha=1.0).initial, 5).tensors.items()
        if key.endswith((".A", ".B"))
    }
    state = tiny.moved(server.initial)
    spec = at_rank(server.spec, 2)
    adapter = AdapterState(spec, resized(state.tensors, spec), residual)
    task = build_task(SequenceClassification(labels=tiny.LABELS, max_tokens=16))
    settings = TrainingConfig(steps=2, batch_size=4, learning_rate=0.05)
    fitted = TorchLearner(server, task, TEXTS, settings, 0, 4, 8).fit(adapter, FitJob(1, 0, (), 0))
    computed = tiny.logits(server.model)
    whole = weights_of(server, fitted.after, residual)
    merged_by_peft: Any = copy.deepcopy(server.model)
    merged_by_peft.merge_adapter(["default", "fedpeft_residual"])
    for path, value in whole.items():
        weight = merged_by_peft.get_submodule(f"base_model.model.{path}.base_layer").weight.detach().double().numpy()
        np.testing.assert_allclose(weight if weight.shape == value.shape else weight.T, value, atol=1e-5)
    moved = [np.abs(fitted.after[key] - fitted.before[key]).max() for key in fitted.after]
    assert min(moved) > 1e-4
    install(server, AdapterState(spec, fitted.after, residual))
    assert_same(tiny.logits(server.model), computed)


def weights_of(
    server: AdaptedModel, adapter: Mapping[str, np.ndarray], residual: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Each adapted weight `(out, in)` of the base with an adapter and a residual added to it."""
    found = {}
    for module in low_rank(server.spec):
        layer: Any = server.model.get_submodule(f"base_model.model.{module.path}.base_layer")
        own = layer.weight.detach().double().numpy()
        change = product(adapter, module.path) + product(residual, module.path)
        found[module.path] = own + (change if isinstance(layer, nn.Linear) else change.T)
    return found
