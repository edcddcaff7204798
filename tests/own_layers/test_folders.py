from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.errors import AdapterError, FedPeftError, ModelError
from fedpeft.files import encode_tensors, read_tensors
from fedpeft.own_layers import install, load, save, trainable
from tests.own_layers.test_methods import bare, trained, values

pytestmark = pytest.mark.usefixtures("one_thread")

INSTALLED: list[tuple[str, dict[str, Any]]] = [
    ("houlsby", {"bottleneck": 3, "layers": [1]}),
    ("ssf", {"target_modules": ["dense"]}),
    ("bitfit", {"biases": ["*.query.bias"]}),
]
UP = "bert.encoder.layer.1.output.dense.fedpeft_houlsby.up.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = bare("bert")
    for method, settings in INSTALLED:
        install(model, method, settings)
    save(trained(model, "bert"), tmp_path, INSTALLED)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = folder / "own_layers.safetensors"
    tensors, fields = read_tensors(path)
    change(tensors)
    path.write_bytes(encode_tensors(tensors, fields))


def resettle(folder: Path, text: str) -> None:
    (folder / "own_layers.json").write_text(text)


def test_several_methods_come_back_in_their_order(folder: Path) -> None:
    model = bare("bert")
    assert load(model, folder) == INSTALLED
    stored, _ = read_tensors(folder / "own_layers.safetensors")
    assert {name for name in stored if name.endswith("query.bias")} == {
        f"bert.encoder.layer.{layer}.attention.self.query.bias" for layer in (0, 1)
    }
    assert stored[UP].shape == (16, 3)
    assert len(stored) == 2 * 4 + 2 * 7 + 2 == len(trainable(model))
    assert not torch.equal(values(model, "bert"), values(bare("bert"), "bert"))
    assert {path.name for path in folder.iterdir()} == {"own_layers.json", "own_layers.safetensors"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: rewrite(f, lambda t: t.pop(UP)),
            rf"expected the 24 tensors that the settings call for, found 1 .* '{UP}', which is missing; use",
        ),
        (lambda f: rewrite(f, lambda t: t.update(more=t[UP])), "found 1 .* 'more', which is unknown"),
        (
            lambda f: rewrite(f, lambda t: t.update({UP: t[UP].T.copy()})),
            rf"tensor {UP}: expected finite numbers of shape \(16, 3\), found float32 of shape \(3, 16\)",
        ),
        (lambda f: rewrite(f, lambda t: t.update({UP: t[UP] * np.float32("nan")})), "expected finite numbers"),
        (lambda f: rewrite(f, lambda t: t.update({UP: t[UP].astype(np.int32)})), "found int32 of shape"),
        (lambda f: (f / "own_layers.safetensors").write_bytes(b"\x80\x04]"), "expected a file of own layers, found"),
        (lambda f: (f / "own_layers.safetensors").unlink(), "expected a file of own layers, found"),
        (lambda f: (f / "own_layers.json").unlink(), "own_layers.json: expected a file of own layers, found FileNot"),
        (lambda f: resettle(f, "{"), "found JSONDecodeError"),
        (lambda f: resettle(f, "[]"), "found TypeError"),
        (lambda f: resettle(f, '{"format": 2, "layers": []}'), "found format 2"),
        (lambda f: resettle(f, '{"format": 1, "layers": [{"method": "ssf"}]}'), "found KeyError: 'settings'"),
        (
            lambda f: resettle(f, '{"format": 1, "layers": [{"method": "no", "settings": {}}]}'),
            "expected one of bitfit",
        ),
        (
            lambda f: resettle(
                f, json.dumps({"format": 1, "layers": [{"method": "houlsby", "settings": {"bottleneck": 10**9}}]})
            ),
            r"adapter\.houlsby\.bottleneck: expected a whole number, 0 to 65536, found 1000000000",
        ),
        (lambda f: resettle(f, '{"format": 1, "layers": []}'), "expected the 0 tensors"),
    ],
)
def test_what_is_not_as_it_was_saved_is_one_sentence(folder: Path, spoil: Callable[[Path], object], words: str) -> None:
    spoil(folder)
    model = bare("bert")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(FedPeftError, match=words) as caught:
        load(model, folder)
    assert isinstance(caught.value, AdapterError | ModelError)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(values(model, "bert"), values(bare("bert"), "bert"))


def test_a_folder_for_another_base_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter\.ssf\.target_modules: expected names of modules that the base has"):
        load(bare("llama"), folder)


def test_low_precision_is_stored_without_loss(tmp_path: Path) -> None:
    model = bare("bert").to(torch.bfloat16)
    install(model, "bitfit", {})
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.3)
    save(model, tmp_path, [("bitfit", {})])
    again = bare("bert").to(torch.bfloat16)
    load(again, tmp_path)
    assert torch.equal(values(again, "bert"), values(model, "bert"))


def test_settings_that_do_not_hold_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter\.ssf: expected settings among layers, target_modules, found 'rank'"):
        save(bare("bert"), tmp_path, [("ssf", {"rank": 3})])
    assert not list(tmp_path.iterdir())
