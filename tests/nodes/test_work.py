from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import RunConfig
from fedpeft.config.node import HeldModel, LimitsConfig, NodeConfig
from fedpeft.config.training import ModelConfig, TrainingConfig
from fedpeft.errors import FederationError, PacketError
from fedpeft.experiment import learner_of, site_examples
from fedpeft.nodes import followed, needed_bytes, require_memory, require_rank, require_room, within
from fedpeft.nodes.following import in_memory, in_parts
from fedpeft.training import LIBRARY_BYTES, TorchLearner, fit_memory_bytes
from fedpeft.wire import Packet
from tests import tiny


@pytest.fixture
def learner(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> TorchLearner:
    config = tiny.run_config(tiny_model, tiny_rows, tmp_path / "run")
    return learner_of(config, site_examples(config, 0))


def test_what_training_needs_is_reckoned_from_two_examples(learner: TorchLearner) -> None:
    """The batch that is not tried needs no more than is reckoned, and not much less."""
    assert len(learner.examples) >= 8
    learner = replace(learner, settings=replace(learner.settings, batch_size=8))
    whole = fit_memory_bytes(learner)
    reckoned = needed_bytes(learner) - LIBRARY_BYTES - needed_base(learner)
    assert whole <= reckoned <= 1.5 * whole


def needed_base(learner: TorchLearner) -> int:
    return sum(p.numel() * p.element_size() for p in learner.adapted.model.parameters() if not p.requires_grad)


def test_training_that_does_not_fit_is_refused(learner: TorchLearner) -> None:
    needed = needed_bytes(learner)
    require_memory(learner, LimitsConfig())
    require_memory(learner, LimitsConfig(memory_gigabytes=needed / 1e9 + 0.001))
    with pytest.raises(PacketError, match=r"memory to train on this node: expected at most 0\.4 GB, .* found 0\.50 GB"):
        require_memory(learner, LimitsConfig(memory_gigabytes=0.4))


def test_a_base_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(4_000_000_000)  # a hole on the disk, whose contents nobody reads
    for weights, gigabytes in (("float32", 4.0), ("bfloat16", 2.0), ("nf4", 0.5)):
        model = ModelConfig(source=str(tmp_path), weights=weights)
        require_room(model, LimitsConfig(memory_gigabytes=gigabytes))
        with pytest.raises(PacketError, match="for the base alone"):
            require_room(model, LimitsConfig(memory_gigabytes=gigabytes - 0.01))


def test_a_rank_above_the_nodes_is_refused() -> None:
    for rank in (0, 4, 8):
        require_rank(Packet("fit", {"rank": 4}), rank)
    require_rank(Packet("describe"), 2)
    with pytest.raises(PacketError, match="expected at most 2, the greatest that this node trains at, found 4"):
        require_rank(Packet("fit", {"rank": 4}), 2)


def test_batches_end_in_a_refusal_when_the_time_is_over(learner: TorchLearner) -> None:
    seconds = iter([100.0, 159.0, 161.0])
    task = learner.task._replace(loss=lambda model, batch: model, score=lambda model, batch: model)
    bounded = within(task, LimitsConfig(round_minutes=1.0), 100.0, lambda: next(seconds))
    model: Any = "the model"
    assert bounded.loss(model, {}) == model
    assert bounded.score(model, {}) == model
    with pytest.raises(FederationError, match=r"at most 1 minutes, its limits\.round_minutes"):
        bounded.loss(model, {})
    assert within(task, LimitsConfig(), 0.0) is task


@pytest.mark.parametrize(
    ("size", "accumulation", "most", "expected"),
    [
        (16, 1, 4, (4, 4)),
        (16, 2, 5, (4, 8)),
        (6, 1, 4, (3, 2)),
        (7, 1, 4, (1, 7)),
        (8, 3, 8, (8, 3)),
        (8, 3, 0, (8, 3)),
    ],
)
def test_a_batch_is_computed_in_equal_parts(size: int, accumulation: int, most: int, expected: tuple[int, int]) -> None:
    found = in_parts(TrainingConfig(batch_size=size, accumulation=accumulation), most)
    assert (found.batch_size, found.accumulation) == expected
    assert found.batch_size * found.accumulation == size * accumulation


def test_a_node_follows_settings_in_its_own_way() -> None:
    node = NodeConfig(
        model=HeldModel(folder="/data/model", weights="nf4", device="cpu"),
        limits=LimitsConfig(batch_size=4, threads=3),
    )
    config = RunConfig(out="/srv/run", model=ModelConfig(source="/srv/model", precision="bfloat16"))
    mine = followed(config, None, node, {"weights": "int8"})
    assert mine.out == ""
    assert mine.model == ModelConfig(source="/data/model", precision="bfloat16", weights="int8", device="cpu")
    assert (mine.training.batch_size, mine.training.accumulation) == (4, 4)
    assert mine.evaluation.batch_size == 4
    assert mine.compute.threads == 3


def test_a_hub_model_is_taken_only_where_the_file_says_so() -> None:
    config = RunConfig(model=ModelConfig(source="somebody/model"))
    with pytest.raises(PacketError, match=r"set model\.from_hub=true in the node's file, or model\.folder"):
        followed(config, None, NodeConfig())
    assert followed(config, None, NodeConfig(model=HeldModel(from_hub=True))).model.source == "somebody/model"


@pytest.mark.parametrize(
    ("asked", "most", "kept"), [(0.0, 0.0, 0.0), (3.0, 0.0, 3.0), (3.0, 2.0, 0.5), (0.25, 2.0, 0.25)]
)
def test_a_node_keeps_activations_in_a_quarter_of_its_memory_at_most(asked: float, most: float, kept: float) -> None:
    assert in_memory(TrainingConfig(cache_gigabytes=asked), most).cache_gigabytes == kept


def test_what_is_kept_counts_as_memory_that_training_needs(learner: TorchLearner) -> None:
    keeping = replace(learner, settings=replace(learner.settings, cache_gigabytes=0.5))
    assert needed_bytes(keeping) - needed_bytes(learner) == 500_000_000
