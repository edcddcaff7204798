from __future__ import annotations

import ast
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from fedpeft import journal
from fedpeft.config import RunConfig, load
from fedpeft.errors import ConfigError
from simulations.benchmarks import against_pfl, sides, suite
from simulations.benchmarks.sides import OURS, Took
from tests.test_project import PINS

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "simulations/benchmarks/usual_pfl.py"


@pytest.fixture(scope="module")
def config(tiny_run: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of three rounds of two clients, whose head learns at a rate of its own."""
    path = tmp_path_factory.mktemp("settings") / "run.toml"
    path.write_text(tiny_run)
    return against_pfl.task(load(path, ["training.head_learning_rate=0.02", "adapter.lora.layers=[1]"]), 3)


@pytest.fixture(scope="module")
def own(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of our run."""
    folder = tmp_path_factory.mktemp("own")
    sides.ours(config, folder)
    return folder / "run"


@pytest.fixture(scope="module")
def prepared(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the other side reads."""
    return against_pfl.prepare(config, tmp_path_factory.mktemp("other"))


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [one for one in journal.read(run / "journal.jsonl") if one["event"] == "round"]


def job_of(prepared: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((prepared / "job.json").read_text())
    return found


def replayed(prepared: Path, visit: dict[str, Any]) -> float:
    """The mean loss of a visit's steps from what was prepared, by stock peft and torch."""
    job = job_of(prepared)
    base = getattr(transformers, job["auto"]).from_pretrained(prepared / "base")
    model = peft.PeftModel.from_pretrained(base, str(prepared / "adapter"), is_trainable=True)
    model.train()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = {True: job["head_learning_rate"], False: job["learning_rate"]}
    optimizer = torch.optim.AdamW(
        [{"params": [parameter], "lr": rates["modules_to_save" in name]} for name, parameter in named],
        weight_decay=job["weight_decay"],
    )
    losses = []
    for batch in visit["batches"]:
        loss = model(**{name: torch.tensor(values) for name, values in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], job["max_gradient_norm"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return statistics.fmean(losses)


def test_the_other_side_is_given_the_clients_and_rows_that_ours_trains_on(own: Path, prepared: Path) -> None:
    trained = [(one["round"], each) for one in rounds_of(own) for each in one["clients"]]
    visits = job_of(prepared)["visits"]
    assert [(at, each["partition"]) for at, each in trained] == [(v["round"], v["partition"]) for v in visits]
    for (_, each), visit in zip(trained, visits, strict=True):
        assert sum(len(batch["labels"]) for batch in visit["batches"]) == each["examples"]
        assert sum(np.sum(batch["attention_mask"]) for batch in visit["batches"]) == each["tokens"]
    assert len({json.dumps(visit["batches"]) for visit in visits}) == len(visits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_from_what_was_prepared_the_first_round_has_the_losses_of_ours(own: Path, prepared: Path) -> None:
    first = rounds_of(own)[0]["clients"]
    visits = job_of(prepared)["visits"][: len(first)]
    assert [replayed(prepared, visit) for visit in visits] == pytest.approx([c["loss"] for c in first], rel=1e-5)


def test_ours_is_held_against_the_faster_way_of_the_other_side() -> None:
    found = [
        {"one": Took(9.0, 4.0), "two": Took(12.0, 3.0), OURS: Took(6.0, 2.0)},
        {"one": Took(10.0, 5.0), "two": Took(9.0, 8.0), OURS: Took(10.0, 4.0)},
    ]
    assert sides.over(found) == {"whole": [1.5, 0.9], "warm": [1.5, 1.25]}
    assert sides.rows("demo", found) == [
        "| demo | one | 9.5 | 4.50 |",
        "| demo | two | 10.5 | 5.50 |",
        "| demo | fedpeft | 8.0 | 3.00 |",
    ]


def test_who_goes_first_turns_and_each_has_a_folder_of_its_own(config: RunConfig) -> None:
    went: list[tuple[str, Path]] = []

    def side(name: str) -> sides.Side:
        def run(_config: RunConfig, folder: Path) -> Took:
            assert list(folder.iterdir()) == []
            went.append((name, folder))
            return Took(2.0, 1.0)

        return run

    found = sides.measure(config, 2, {name: side(name) for name in ("a", "b", "c")})
    assert [name for name, _ in went] == ["a", "b", "c", "b", "c", "a"]
    assert len({folder for _, folder in went}) == 6
    assert [list(each) for each in found] == [["a", "b", "c"]] * 2


def test_without_its_environment_the_part_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv-bench/bin").mkdir(parents=True)
    found = suite.pfl(Path("none"), suite.FULL)
    assert not found.ratios
    assert found.tables == (text := [f"Not measured: {refused()}"])
    assert "`make bench-pfl-env`" in text[0]


def refused() -> str:
    with pytest.raises(ConfigError) as told:
        against_pfl.require()
    return str(told.value)


@pytest.mark.parametrize("only", ["pfl", "merge,pfl"])
def test_named_without_its_environment_the_part_is_refused_before_anything_is_measured(
    only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="make bench-pfl-env"):
        suite.main(name="x", only=only, settings=Path("none"), out=tmp_path / "results", readme=None)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("kept", "ratios"), [({}, {}), ({"ratios": {"vs_pfl": 1.5}, "tables": {"pfl": ["| a |"]}}, {"vs_pfl": 1.5})]
)
def test_a_part_left_out_is_said_and_keeps_what_was_measured_before(
    kept: dict[str, Any], ratios: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "PARTS", {"pfl": suite.pfl})
    if kept:
        whole = {**suite.results({}), **kept, "spread": {"vs_pfl": {"least": 1.0, "most": 2.0}}}
        (tmp_path / "x.json").write_text(json.dumps(whole))
    suite.main(name="x", only="pfl", settings=Path("none"), out=tmp_path, readme=None)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["ratios"] == ratios
    assert ("make bench-pfl-env" in found["tables"]["pfl"][0]) is not bool(kept)


def test_both_sides_have_the_libraries_that_are_pinned() -> None:
    lines = (ROOT / "simulations/benchmarks/pfl.txt").read_text().splitlines()
    wanted = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert wanted.pop("pfl") == "0.6.0"
    assert wanted == {name: PINS[name] for name in wanted}
    assert {"torch", "transformers", "peft"} <= set(wanted)


def test_the_other_side_knows_nothing_of_this_project() -> None:
    tree = ast.walk(ast.parse(SCRIPT.read_text()))
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name if isinstance(node, ast.Import) else str(node.module) for node in imports for name in node.names}
    assert "pfl.model.pytorch" in names
    assert not {name.partition(".")[0] for name in names} & {"fedpeft", "simulations", "clients", "server"}


@pytest.mark.engines
@pytest.mark.skipif(not against_pfl.HOME.exists(), reason="needs .venv-bench: make bench-pfl-env")
@pytest.mark.parametrize("processes", [1, 2])
def test_pfl_trains_the_adapter_that_ours_trains(processes: int, config: RunConfig, own: Path, prepared: Path) -> None:
    seconds, said = against_pfl.run(prepared, processes)
    assert 0 < said["rounds"][0] < said["rounds"][1] < said["rounds"][2] < said["whole"] < seconds
    if processes == 1:
        losses = [statistics.fmean(each["loss"] for each in one["clients"]) for one in rounds_of(own)]
        assert said["losses"] == pytest.approx(losses, rel=1e-4)
    trained = load_file(prepared / "trained/adapter_model.safetensors")
    ours = load_file(next(own.rglob("adapter_model.safetensors")))
    began = load_file(prepared / "adapter/adapter_model.safetensors")
    assert trained.keys() == ours.keys() == began.keys()
    for key, value in trained.items():
        np.testing.assert_allclose(value, ours[key], atol=1e-4, err_msg=key)
    assert any(np.abs(value - began[key]).max() > 1e-2 for key, value in trained.items())
