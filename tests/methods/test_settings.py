"""Settings that a method could go wrong with: each works, or is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from fedpeft import models
from fedpeft.config.adapters import ADAPTERS
from fedpeft.errors import ModelError
from fedpeft.models import AdaptedModel
from tests.methods import cells
from tests.methods.cells import bare, fitted, logits
from tests.methods.test_contract import pytestmark as pytestmark


def adapted(name: str, kind: str, **settings: Any) -> AdaptedModel:
    return cells.of_family(ADAPTERS.members[name](**settings).build(), kind, 1)


@pytest.mark.parametrize(
    ("name", "kind", "settings", "words"),
    [
        ("lora", "bert", {"options": ("lora_bias = true",)}, "options that add no tensors"),
        ("lora", "bert", {"options": ("use_dora = true",)}, "options that add no tensors"),
        ("lokr", "bert", {"rank": 1, "options": ("decompose_both = true",)}, "options that add no tensors"),
        ("trainable_tokens", "llama", {"target_modules": ("embed_tokens",), "tokens": (1000,)}, "out of"),
        ("vera", "bert", {"target_modules": ("all-linear",)}, "expected names of modules"),
        ("c3a", "vit", {"target_modules": ("all-linear",)}, "expected names of modules"),
        ("lora_sb", "vit", {"target_modules": ("projection",)}, "expected linear layers"),
        ("lora", "bert", {"target_modules": ("word_embeddings",), "dora": True}, "expected linear layers"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(name: str, kind: str, settings: dict[str, Any], words: str) -> None:
    if "target_modules" not in settings:
        settings = {**settings, "target_modules": ("query",)}
    with pytest.raises(ModelError) as refused:
        adapted(name, kind, **settings)
    said = str(refused.value)
    assert words in said
    assert said.startswith(f"adapter.{name}")
    assert "\n" not in said
    assert "exclude_modules" not in said


@pytest.mark.parametrize("own", ["ssf"])
def test_an_adapter_on_a_layer_of_ours_is_refused_by_the_layers_name(own: str) -> None:
    with pytest.raises(ModelError) as refused:
        cells.made(cells.Cell(f"lora+{own}", "bert"), 1)
    assert str(refused.value) == (
        f"adapter.lora+{own}.target_modules: expected modules that this family can be put on, found Scaled; "
        "name others, or leave out the method that is on them already."
    )


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "hira", "adalora", "oft", "hra"])
def test_convolutions_are_adapted_too(name: str) -> None:
    settings = {"block_size": 4} if name == "oft" else {"rank": 2}
    made = adapted(name, "vit", target_modules=("projection",), **settings)
    after = fitted(made, "vit", made.initial, 1, steps=1)
    models.install(made, after)
    assert models.extract(made).tensors.keys() == made.spec.shapes.keys()


@pytest.mark.parametrize("name", ["lora", "hira"])
def test_ranks_by_pattern_are_saved_so_that_stock_peft_loads_them(tmp_path: Path, name: str) -> None:
    made = adapted(name, "bert", rank=3, target_modules=("query", "value"), options=('rank_pattern = {"query": 2}',))
    state = fitted(made, "bert", made.initial, 1)
    models.save_adapter(made, state, tmp_path)
    again = peft.PeftModel.from_pretrained(bare("bert"), str(tmp_path))
    assert torch.equal(logits(again, "bert"), logits(made.model, "bert"))
