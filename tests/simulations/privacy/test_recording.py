"""A recorded run is the run, and what adversaries are given of it holds no row of anybody."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import checkpoint
from fedpeft.config import RunConfig, override
from fedpeft.data.rows import Row
from fedpeft.errors import PlanError
from fedpeft.experiment import deal_rows, resolve
from fedpeft.federate import federate
from fedpeft.runs import RunFolder
from fedpeft.tasks.examples import Example
from fedpeft.wire import Failure
from simulations.privacy.recording import Between, Recorded, public_of, record, require_views, sites_with
from simulations.privacy.views import Aggregate, ClientDelta, FinalAdapter
from tests import tiny


def parts(value: Any) -> Iterator[Any]:
    """Everything that is inside a value, however deep."""
    yield value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from parts(getattr(value, item.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from parts(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from parts(item)


@pytest.mark.usefixtures("one_thread")
def test_the_adapter_of_a_recorded_run_is_that_of_the_run(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, folder = tiny_config(rounds=2), RunFolder(tmp_path)
    federate(config, folder, tiny.transport(config, folder), engine="local")
    torch.set_num_threads(1)
    found = record(config).final.adapter.tensors
    for key, value in checkpoint.load(folder.checkpoint).adapter.tensors.items():
        np.testing.assert_array_equal(found[key], value)


def test_the_aggregates_are_the_means_of_the_deltas_of_their_rounds(recorded: tuple[RunConfig, Recorded]) -> None:
    config, run = recorded
    assert [view.round for view in run.aggregates] == [1, 2, 3]
    assert len(run.clients) == 3 * config.federation.cohort
    for view in run.aggregates:
        of_round = [one for one in run.clients if one.round == view.round]
        weights = np.array([one.examples for one in of_round], float) / sum(one.examples for one in of_round)
        for key, moved in view.delta.items():
            mean = sum(w * one.delta[key] for w, one in zip(weights, of_round, strict=True))
            np.testing.assert_allclose(moved, mean, atol=1e-6)
        for one in of_round:
            np.testing.assert_array_equal(
                one.received.tensors["classifier.weight"], view.before.tensors["classifier.weight"]
            )


def test_the_batches_are_what_the_clients_say_that_they_trained_on(recorded: tuple[RunConfig, Recorded]) -> None:
    _, run = recorded
    for view in run.clients:
        batch = run.batches[view.round, view.partition]
        assert len(batch) == view.examples
        assert sum(example.size for example in batch) == view.tokens


def test_no_view_holds_a_row_or_a_text_of_one(recorded: tuple[RunConfig, Recorded]) -> None:
    config, run = recorded
    texts = {row.text for site in deal_rows(config).sites for row in site}
    views: list[ClientDelta | Aggregate | FinalAdapter] = [*run.clients, *run.aggregates, run.final]
    held = [part for view in views for part in parts(view)]
    assert not [part for part in held if isinstance(part, Row | Example)]
    assert not texts & {part for part in held if isinstance(part, str)}
    assert not [part for part in held if callable(part)]  # no way round to somebody who has rows
    assert any(isinstance(part, np.ndarray) for part in held)
    assert [part for part in parts(run) if isinstance(part, Example)]  # where there are rows, they are found


def test_what_is_public_holds_no_rows_but_those_that_were_made_public(recorded: tuple[RunConfig, Recorded]) -> None:
    config, _ = recorded
    assert not [part for part in parts(public_of(config)) if isinstance(part, Row | Example)]
    assert public_of(config, deal_rows(config).test).rows == deal_rows(config).test


def test_a_clients_adapter_is_what_it_received_and_what_it_moved(recorded: tuple[RunConfig, Recorded]) -> None:
    _, run = recorded
    view = run.clients[0]
    for key, value in view.adapter.tensors.items():
        np.testing.assert_array_equal(value, view.received.tensors[key] + view.delta[key])
    assert run.aggregates[-1].adapter is run.aggregates[-1].after


def test_sites_train_on_the_rows_that_they_are_given(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(rounds=1, federation={"cohort": 3})
    rows = [Row("very good film", "yes"), Row("so dull news", "no")]
    run = record(config, sites_with(config, lambda partition: rows[:1] if partition else rows))
    assert {partition: len(set(batch)) for (_, partition), batch in run.batches.items()} == {0: 2, 1: 1, 2: 1}


def test_what_stands_between_decides_what_the_server_gets(tiny_config: Callable[..., RunConfig]) -> None:
    config, rounds = tiny_config(rounds=2, federation={"cohort": 3}), []

    def wrap(inner: Any, state: Any) -> Between:
        def lose(requests: Any, replies: Any) -> Any:
            rounds.append(state().round)
            for partition, reply in replies:
                yield partition, Failure("lost") if partition == 1 else reply

        return Between(inner, lose)

    run = record(config, wrap=wrap)
    assert {view.partition for view in run.clients} == {0, 2}
    assert rounds == [0, 1]


def test_where_the_server_sees_sums_alone_there_are_aggregates_and_no_deltas(
    tiny_config: Callable[..., RunConfig],
) -> None:
    secure = (
        "federation.clients=5",
        "federation.cohort=5",
        "federation.channel.kind=secure",
        "aggregation.merge.rule=ffa_lora",
        "aggregation.merge.ffa_lora.weights=uniform",
    )
    run = record(resolve(override(tiny_config(rounds=2), secure)))
    assert not run.clients
    assert [view.round for view in run.aggregates] == [1, 2]
    assert any(np.any(value) for value in run.aggregates[0].delta.values())
    assert set(run.batches) == {(round_, partition) for round_ in (1, 2) for partition in range(5)}
    assert all(4 < len(batch) <= 8 for batch in run.batches.values())  # two batches of four, one of which may be short


def test_an_adversary_without_views_is_refused_in_words() -> None:
    with pytest.raises(PlanError, match=r"view client: expected updates that the server can read, found none"):
        require_views((), "client")
