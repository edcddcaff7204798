"""The exact mean against peft's own `add_weighted_adapter`: "cat" and "svd" agree with it, "linear" is not a mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import nn

from fedpeft.adapter_folders import read_adapter_folder
from fedpeft.adapters import AdapterState, at_ranks
from fedpeft.merges import exactness
from fedpeft.updates import ServerState, Update
from tests.merges.harness import RUN, Dense, assert_near, does, low_rank, method_of, strategy_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    # peft asks transformers 5 for it under its old name.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

UNLIKE: tuple[dict[str, Any], ...] = (
    {"r": 2, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 3, "use_rslora": True},
    {"r": 3, "lora_alpha": 5},
)
ALIKE: tuple[dict[str, Any], ...] = ({"r": 3, "lora_alpha": 5},) * 3
NAMES = ("one", "two", "three")
EXAMPLES = (3, 5, 2)
SHARES = tuple(count / sum(EXAMPLES) for count in EXAMPLES)
TOTAL_RANK = 9


def bert() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertModel(transformers.BertConfig(vocab_size=19, num_hidden_layers=2, **sizes))


def gpt2() -> nn.Module:
    return transformers.GPT2Model(transformers.GPT2Config(vocab_size=19, n_embd=16, n_head=2, n_layer=1, n_inner=24))


BASES = {
    "linear": (bert, ["query", "value", "intermediate.dense"]),
    "transposed": (gpt2, ["c_attn", "c_fc"]),
    "embedding": (bert, ["word_embeddings", "key"]),
}


def adapted(kind: str, clients: Sequence[dict[str, Any]]) -> peft.PeftModel:
    """A random model with the clients' random adapters on it, under `NAMES`."""
    build, targets = BASES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        configs = [peft.LoraConfig(target_modules=targets, **client) for client in clients]
        model = peft.get_peft_model(build(), configs[0], adapter_name=NAMES[0])
        for name, config in zip(NAMES[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(0, 0.3)
    return model


def changes(model: peft.PeftModel, name: str) -> Dense:
    """What peft's adapter `name` adds to each weight `(out, in)`, float64."""
    found = {}
    layers: dict[str, Any] = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer) and name in layer.scaling
    }
    for path, layer in layers.items():
        change = layer.get_delta_weight(name).detach().double().numpy()
        turned = isinstance(layer.get_base_layer(), nn.Embedding) or getattr(layer, "fan_in_fan_out", False)
        found[path.removeprefix("base_model.model.")] = change.T if turned else change
    return found


def stored(model: peft.PeftModel, folder: Path) -> list[AdapterState]:
    """The model's adapters as read from the folders that peft saves."""
    model.save_pretrained(str(folder), selected_adapters=list(NAMES))
    return [read_adapter_folder(folder / name).state for name in NAMES]


def merged(name: str, states: Sequence[AdapterState], rank: int, **settings: Any) -> AdapterState:
    """The server's adapter after the clients, which began with zeros, came back with `states`."""
    paths = {module.path: rank for module in low_rank(states[0].spec)}
    spec = at_ranks(states[0].spec, paths)
    start = AdapterState(spec, {key: np.zeros(shape, np.float32) for key, shape in spec.shapes.items()})
    updates = [
        Update(at_ranks(spec, {m.path: m.rank for m in low_rank(state.spec)}), state.tensors, examples, examples)
        for state, examples in zip(states, EXAMPLES, strict=True)
    ]
    state = ServerState(RUN, 0, 0, start)
    return strategy_of(method_of(name, **settings)).aggregate(state, iter(updates))[0].adapter


def sizes(found: Dense) -> dict[str, float]:
    return {path: float(np.linalg.norm(value)) for path, value in found.items()}


@pytest.mark.parametrize("kind", sorted(BASES))
@pytest.mark.parametrize(("combination", "settings"), [("cat", {}), ("svd", {"svd_rank": TOTAL_RANK})])
def test_cat_and_svd_at_full_rank_are_the_exact_mean(
    kind: str, combination: str, settings: dict[str, int], tmp_path: Path
) -> None:
    model = adapted(kind, UNLIKE)
    states = stored(model, tmp_path)
    model.add_weighted_adapter(list(NAMES), list(SHARES), "mean", combination_type=combination, **settings)
    theirs = changes(model, "mean")
    for name, rank in (("flora", 4), ("fedex", 4), ("flexlora", TOTAL_RANK)):
        assert_near(does(merged(name, states, rank)), theirs, sizes(theirs), 1e-6)


@pytest.mark.parametrize("kind", sorted(BASES))
def test_a_target_is_the_mean_of_what_peft_computes(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, UNLIKE)
    target, mean = exactness.begin(), [changes(model, name) for name in NAMES]
    for state, examples in zip(stored(model, tmp_path), EXAMPLES, strict=True):
        still = {key: np.zeros_like(value) for key, value in state.tensors.items()}
        target = exactness.add(target, tuple(low_rank(state.spec)), state.tensors, still, float(examples))
    ours = {path: product.b @ product.a for path, product in exactness.means(target).items()}
    theirs = {path: np.average([one[path] for one in mean], axis=0, weights=SHARES) for path in ours}
    assert_near(ours, theirs, sizes(theirs), 1e-6)


@pytest.mark.parametrize("kind", sorted(BASES))
def test_svd_at_a_lower_rank_is_flexlora(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, UNLIKE)
    states = stored(model, tmp_path)
    model.add_weighted_adapter(list(NAMES), list(SHARES), "mean", combination_type="svd", svd_rank=4)
    theirs = changes(model, "mean")
    assert_near(does(merged("flexlora", states, 4)), theirs, sizes(theirs))


def test_linear_on_three_equal_clients_at_a_third_is_three_times_as_much(tmp_path: Path) -> None:
    model = adapted("linear", ALIKE)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                first = path.replace(".two.", ".one.").replace(".three.", ".one.")
                parameter.copy_(model.get_parameter(first))
    states, alone = stored(model, tmp_path), changes(model, "one")
    model.add_weighted_adapter(list(NAMES), [1 / 3] * 3, "linear", combination_type="linear")
    model.add_weighted_adapter(list(NAMES), [1 / 3] * 3, "cat", combination_type="cat")
    assert_near(changes(model, "cat"), alone, sizes(alone), 1e-6)
    tripled = {path: 3 * value for path, value in alone.items()}
    assert_near(changes(model, "linear"), tripled, sizes(alone), 1e-6)
    for name in ("fedavg", "flora", "fedex", "flexlora"):
        assert_near(does(merged(name, states, 3, weights="uniform")), alone, sizes(alone), 1e-6)


def test_cat_is_off_by_the_root_of_its_rank_where_the_first_adapter_is_rank_stabilised(tmp_path: Path) -> None:
    model = adapted("linear", (UNLIKE[1], UNLIKE[0], UNLIKE[2]))
    states = stored(model, tmp_path)
    model.add_weighted_adapter(list(NAMES), list(SHARES), "cat", combination_type="cat")
    ours = does(merged("flora", states, 4))
    exact = {path: value / np.sqrt(TOTAL_RANK) for path, value in changes(model, "cat").items()}
    assert_near(ours, exact, sizes(ours), 1e-6)
