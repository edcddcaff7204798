"""Masks: which numbers are chosen, that they alone move, and that nothing else of the base is touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft import models
from fedpeft.adapters import AdapterState, own_family, peft_family, together
from fedpeft.config import RunConfig
from fedpeft.errors import AdapterError, DataError, ModelError, PlanError
from fedpeft.experiment import adapted_model, deal_rows, start_of
from fedpeft.federate import federate
from fedpeft.own_layers import install, masks, places_at, remove, spots
from fedpeft.runs import RunFolder, folder_for
from tests import tiny, tiny_models
from tests.methods.cells import Cell, fitted, logits, made, of_family
from tests.own_layers.test_methods import bare, values

pytestmark = pytest.mark.usefixtures("one_thread")

FISH = Cell("fish_mask", "bert")


def by_name(adapted: Any, state: AdapterState) -> dict[str, torch.Tensor]:
    """For each parameter of the base that a mask may change: True where it does."""
    names = {id(parameter): name for name, parameter in adapted.model.named_parameters()}
    mask = masks(adapted.model)[0]
    chosen = {names[id(spot.original)]: torch.zeros_like(spot.original, dtype=torch.bool) for spot in spots(mask)}
    listed = list(chosen.values())
    for number, row, column in state.tensors[f"{mask.method}.places"].astype(int):
        flat = listed[number].view(*spots(mask)[number].shape)
        assert not flat[row, column], "a place twice"
        flat[row, column] = True
    return chosen


def information(kind: str) -> dict[str, torch.Tensor]:
    """Squared gradients of the bare base, added over the three batches that the cells choose by."""
    model: Any = bare(kind).eval()
    model.requires_grad_(True)
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for seed in range(3):
        model.zero_grad()
        tiny_models.loss(model, kind, 100 + seed).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad**2
    return sums


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_the_numbers_with_the_greatest_squared_gradients_are_chosen(kind: str) -> None:
    adapted = made(Cell("fish_mask", kind), 1)
    chosen = by_name(adapted, adapted.initial)
    scores = information(kind)
    inside = torch.cat([scores[name][where] for name, where in chosen.items()])
    outside = torch.cat([scores[name][~where] for name, where in chosen.items()])
    assert len(inside) == round(0.05 * (len(inside) + len(outside)))
    assert inside.min() >= outside.max()
    assert not any("classifier" in name for name in chosen), "the head is trained whole"


def test_balanced_places_are_the_same_share_of_each_parameter() -> None:
    adapted = made(Cell("child_tuning", "bert"), 1)
    scores = information("bert")
    for name, where in by_name(adapted, adapted.initial).items():
        assert abs(int(where.sum()) - 0.2 * where.numel()) <= 1, name
        assert scores[name][where].min() >= scores[name][~where].max(), name


def test_of_equal_scores_the_first_is_chosen() -> None:
    scores = [torch.tensor([[0.0, 2.0], [2.0, 1.0]]), torch.tensor([2.0, 0.0])]
    assert places_at(scores, 2).tolist() == [[0, 0, 1], [0, 1, 0]]
    assert places_at(scores, 4).tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert places_at(scores, 3, balanced=True).tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_the_chosen_numbers_alone_move(tmp_path: Path) -> None:
    adapted = made(FISH, 1)
    trained = fitted(adapted, "bert", adapted.initial, seed=1)
    np.testing.assert_array_equal(trained.tensors["fish_mask.places"], adapted.initial.tensors["fish_mask.places"])
    chosen = by_name(adapted, trained)
    models.save_merged(adapted, trained, tmp_path)
    after = type(adapted.model).from_pretrained(tmp_path)
    before = dict(bare("bert").named_parameters())
    moved = {name: value != before[name] for name, value in after.named_parameters() if name in chosen}
    assert moved.keys() == chosen.keys()
    assert all(not (moved[name] & ~where).any() for name, where in chosen.items())
    assert sum(int(one.sum()) for one in moved.values()) > 0.9 * len(trained.tensors["fish_mask.values"])
    assert torch.equal(logits(after, "bert"), logits(adapted.model, "bert"))


def test_a_module_that_fails_shows_the_base_again() -> None:
    adapted = made(FISH, 1)
    models.install(adapted, fitted(adapted, "bert", adapted.initial, seed=1))
    layer = adapted.model.get_submodule("bert.encoder.layer.0.output.dense")
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 3))
    assert "weight" not in layer.__dict__
    assert torch.equal(layer.weight, bare("bert").get_parameter("bert.encoder.layer.0.output.dense.weight"))


def test_a_copy_has_a_mask_of_its_own() -> None:
    adapted = made(FISH, 1)
    head = adapted.spec.matching(["classifier.*"])
    models.install(adapted, fitted(adapted, "bert", adapted.initial, seed=1, frozen=head))
    before = logits(adapted.model, "bert")
    other = copy.deepcopy(adapted.model)
    remove(other)
    assert torch.equal(values(other, "bert"), values(bare("bert"), "bert"))
    assert torch.equal(logits(adapted.model, "bert"), before)


@pytest.mark.parametrize("place", [(999, 0, 0), (0, -1, 0), (0, 0, 10**6), (0, 0.5, 0), (np.nan, 0, 0)])
def test_a_place_that_the_base_does_not_have_is_refused(place: tuple[float, ...]) -> None:
    adapted = made(FISH, 1)
    mask = masks(adapted.model)[0]
    mask.places.data[0] = torch.tensor(place)
    with pytest.raises(AdapterError, match=r"adapter\.fish_mask, places: expected parameters, rows and columns"):
        logits(adapted.model, "bert")


def test_a_mask_beside_lora_merges_into_what_both_compute(tmp_path: Path) -> None:
    low_rank = peft_family("lora", "LORA", {"lora_A": "A", "lora_B": "B"}, r=3, target_modules=["query", "value"])
    adapted = of_family(together([low_rank, own_family("fish_mask", share=0.05)]), "bert", 1)
    trained = fitted(adapted, "bert", adapted.initial, seed=1)
    models.save_merged(adapted, trained, tmp_path)
    merged = logits(type(adapted.model.get_base_model()).from_pretrained(tmp_path), "bert")
    torch.testing.assert_close(merged, logits(adapted.model, "bert"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, logits(bare("bert"), "bert"), atol=1e-2)


@pytest.mark.parametrize("other", ["ssf", "bitfit", "child_tuning"])
def test_what_does_more_to_weights_than_add_is_refused_beside_a_mask(other: str) -> None:
    with pytest.raises(PlanError, match=r"expected fish_mask beside families that add"):
        together([own_family("fish_mask"), own_family(other)])


def test_tied_weights_are_left_out() -> None:
    model = bare("t5")
    install(model, "fish_mask", {})
    assert all(spot.original is not model.shared.weight for spot in spots(masks(model)[0]))


def test_a_share_too_small_and_quantised_weights_are_refused() -> None:
    model = bare("bert")
    with pytest.raises(ModelError, match=r"adapter\.fish_mask\.share: expected one number at least, found 1e-09"):
        install(model, "fish_mask", {"share": 1e-9})
    layer: nn.Module = model.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"output\.dense: expected weights that are not quantised, found uint8"):
        install(model, "fish_mask", {})


def masked(model: Path, rows: Path, out: Path, **changes: Any) -> RunConfig:
    given: dict[str, Any] = {
        "rounds": 3,
        "training": {"steps": 4, "batch_size": 8, "learning_rate": 0.02},
        "adapter": {"family": "fish_mask", "fish_mask": {"share": 0.05}},
        "data": {"server_rows": 10},
    }
    return tiny.run_config(model, rows, out, **{**given, **changes})


def run(config: RunConfig, *, resume: bool = False) -> bytes:
    folder = RunFolder(Path(config.out)) if resume else folder_for(config)
    federate(config, folder, tiny.transport(config, folder), engine="local", resume=resume)
    return (folder.adapter / "own_layers.safetensors").read_bytes()


def test_a_federation_trains_what_the_server_chose(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    config = masked(tiny_model, tiny_rows, tmp_path / "one")
    dealt = deal_rows(config)
    elsewhere = {row.text for site in (*dealt.sites, dealt.test) for row in site}
    assert len(dealt.server) == dealt.report.server_rows == 10
    assert not elsewhere & {row.text for row in dealt.server}
    start = start_of(config)
    assert len(np.unique(start.tensors["fish_mask.places"], axis=0)) == len(start.tensors["fish_mask.values"])
    assert not np.array_equal(
        start.tensors["fish_mask.places"], adapted_model(config).initial.tensors["fish_mask.places"]
    )
    one = run(config)
    assert one == run(masked(tiny_model, tiny_rows, tmp_path / "two"))
    assert one == run(config, resume=True)


def test_without_rows_of_the_servers_own_nothing_is_chosen(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    config = masked(tiny_model, tiny_rows, tmp_path / "run", data={"server_rows": 0})
    with pytest.raises(PlanError, match=r"data\.server_rows: expected rows of the server's own, by which fish_mask"):
        run(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=r"data\.server_rows: expected at most half of \d+ training rows, found 10000"):
        deal_rows(masked(tiny_model, tiny_rows, tmp_path / "run", data={"server_rows": 10_000}))
