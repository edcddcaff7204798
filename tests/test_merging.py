"""`fedpeft merge` and its Python face, on folders that are written here; stock peft reads them in tests/merges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fedpeft
from fedpeft.adapter_folders import read_adapter_folder, write_adapter_folder
from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec
from fedpeft.cli import app
from fedpeft.errors import AdapterError, ConfigError, PlanError
from fedpeft.randomness import rng

SHAPES = {"body.q": (6, 5), "body.v": (4, 4), "body.k": (3, 7)}
"""(out, in) of the modules; a rank of 4 makes B of body.v square."""


def state(seed: int, ranks: dict[str, int], head: int = 2) -> AdapterState:
    """A random adapter of these ranks, and a head of as many outputs."""
    random = rng(seed, "state")
    modules = [
        ModuleSpec(path, "lora", rank, 1.0, (("A", (rank, SHAPES[path][1])), ("B", (SHAPES[path][0], rank))))
        for path, rank in sorted(ranks.items())
    ]
    modules += [ModuleSpec("classifier", "full", 0, 1.0, (("weight", (head, 5)),))] if head else []
    spec = AdapterSpec("base", "lora", tuple(modules))
    return AdapterState(spec, {key: random.standard_normal(s).astype(np.float32) for key, s in spec.shapes.items()})


def folder(root: Path, name: str, adapter: AdapterState) -> Path:
    saved = ["classifier"] if "classifier.weight" in adapter.tensors else None
    write_adapter_folder(root / name, adapter, {"base_model_name_or_path": "base", "modules_to_save": saved})
    return root / name


def product(adapter: AdapterState, path: str) -> np.ndarray:
    b, a = (adapter.tensors.get(f"{path}.{name}") for name in "BA")
    if b is None or a is None:
        return np.zeros(SHAPES[path])
    return b.astype(np.float64) @ a.astype(np.float64)


@pytest.fixture
def sites(tmp_path: Path) -> tuple[list[Path], list[AdapterState]]:
    """Three adapters of unlike ranks, of which one lacks a module and one the head."""
    made = [
        state(1, {"body.q": 1, "body.v": 4}),
        state(2, {"body.q": 3, "body.v": 2, "body.k": 2}),
        state(3, {"body.q": 2, "body.v": 1, "body.k": 1}, head=0),
    ]
    return [folder(tmp_path, f"site-{at}", one) for at, one in enumerate(made)], made


@pytest.mark.parametrize("method", ["flora", "fedex"])
def test_the_exact_rules_write_the_exact_mean(
    tmp_path: Path, sites: tuple[list[Path], list[AdapterState]], method: str
) -> None:
    folders, states = sites
    merged = fedpeft.merge(folders, method, weights=[3, 1, 2])
    merged.write(tmp_path / "merged")
    found = read_adapter_folder(tmp_path / "merged").state
    for path in SHAPES:
        expected = sum(w * product(one, path) for w, one in zip((3, 1, 2), states, strict=True)) / 6
        np.testing.assert_allclose(product(found, path), expected, atol=1e-6)
    assert merged.report.error < 1e-6
    head = (3 * states[0].tensors["classifier.weight"] + states[1].tensors["classifier.weight"]) / 4
    np.testing.assert_allclose(found.tensors["classifier.weight"], head, atol=1e-6)
    ranks = {module.path: module.rank for module in found.spec.modules if module.rank}
    assert ranks == {"body.q": 5, "body.v": 4, "body.k": 3}, "the rank that the mean has, and no more"


def test_a_missing_module_is_zero_or_not_there(sites: tuple[list[Path], list[AdapterState]]) -> None:
    folders, states = sites
    covered = fedpeft.merge(folders, "flora", weights=[3, 1, 2], missing="covered").state
    expected = (product(states[1], "body.k") + 2 * product(states[2], "body.k")) / 3
    np.testing.assert_allclose(product(covered, "body.k"), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["flora", "fedex", "flexlora"])
def test_a_rank_compresses_to_the_nearest(sites: tuple[list[Path], list[AdapterState]], method: str) -> None:
    folders, states = sites
    merged = fedpeft.merge(folders, method, rank=2)
    missed = wanted = 0.0
    for path in SHAPES:
        exact = sum(product(one, path) for one in states) / 3
        values = np.linalg.svd(exact, compute_uv=False)
        gap = np.linalg.norm(product(merged.state, path) - exact)
        assert gap == pytest.approx(np.linalg.norm(values[2:]), rel=1e-4)
        missed, wanted = missed + gap**2, wanted + np.linalg.norm(exact) ** 2
    assert merged.report.error == pytest.approx((missed / wanted) ** 0.5, rel=1e-4)
    assert all(module.rank <= 2 for module in merged.state.spec.modules)


@pytest.mark.parametrize("method", ["fedavg", "zero_pad", "hetlora", "lora_fair"])
def test_the_error_is_that_of_what_was_written(sites: tuple[list[Path], list[AdapterState]], method: str) -> None:
    folders, states = sites
    merged = fedpeft.merge(folders, method)
    exact = {path: sum(product(one, path) for one in states) / 3 for path in SHAPES}
    missed = sum(np.linalg.norm(product(merged.state, path) - mean) ** 2 for path, mean in exact.items())
    wanted = sum(np.linalg.norm(mean) ** 2 for mean in exact.values())
    assert merged.report.error == pytest.approx((missed / wanted) ** 0.5, rel=1e-5)
    assert merged.report.error > 0.01


def test_the_command_says_what_it_did(tmp_path: Path, sites: tuple[list[Path], list[AdapterState]]) -> None:
    folders, _ = sites
    out = tmp_path / "merged"
    words = [
        "merge",
        *map(str, folders),
        "--method",
        "flexlora",
        "--weights",
        "3,1,2",
        "--rank",
        "2",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "50.0%" in done.output
    assert "error against the exact mean:" in done.output
    assert read_adapter_folder(out).state.spec.modules[1].rank == 2


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"weights": [1, 2]}, PlanError, "expected 3 numbers above 0.*found 1, 2"),
        ({"weights": [1, -2, 3]}, PlanError, "expected 3 numbers above 0"),
        ({"weights": [1, float("nan"), 3]}, PlanError, "expected 3 numbers above 0"),
        ({"method": "fllora"}, ConfigError, "expected one of .*flora"),
        ({"method": "ffa_lora"}, PlanError, "expected one that merges both factors"),
        ({"method": "fed_sb"}, PlanError, "expected one that merges both factors"),
        ({"method": "krum"}, PlanError, "expected at least 5 adapters"),
        ({"method": "median"}, PlanError, "expected one rank"),
        ({"missing": "none"}, ConfigError, "expected one of zero, covered"),
        ({"rank": -1}, PlanError, "expected 0 or more"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    sites: tuple[list[Path], list[AdapterState]], options: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        fedpeft.merge(sites[0], **{"method": "flora", **options})  # type: ignore[arg-type]


def test_adapters_of_unlike_models_are_refused(tmp_path: Path, sites: tuple[list[Path], list[AdapterState]]) -> None:
    odd = state(4, {"body.q": 1})
    odd.tensors["classifier.weight"] = np.zeros((7, 5), np.float32)  # type: ignore[index]
    other = AdapterState(state(4, {"body.q": 1}, head=7).spec, odd.tensors)
    with pytest.raises(AdapterError, match="module classifier: expected shapes as in"):
        fedpeft.merge([*sites[0], folder(tmp_path, "odd", other)])


def test_nothing_is_written_over(tmp_path: Path, sites: tuple[list[Path], list[AdapterState]]) -> None:
    with pytest.raises(AdapterError, match="expected"):
        fedpeft.merge(sites[0]).write(sites[0][0])
    assert read_adapter_folder(sites[0][0]).state.tensors.keys() == sites[1][0].tensors.keys()


def test_none_is_not_enough() -> None:
    with pytest.raises(PlanError, match="expected at least one adapter folder"):
        fedpeft.merge([])
