"""Steps that torch has compiled come to what steps come to, and a refusal is a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from fedpeft.client import FitJob
from fedpeft.compiling import compiled
from fedpeft.config import RunConfig, override
from fedpeft.config.training import TrainingConfig
from fedpeft.errors import ConfigError, PlanError
from fedpeft.experiment import resolve, site_of
from tests import tiny


def test_clients_of_unlike_batches_train_as_they_do_uncompiled(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_noted(model: Any, **more: Any) -> Any:
        noted.append(more["backend"])
        return made(model, **more)

    noted, made = list[str](), torch.compile
    monkeypatch.setattr("torch.compile", compile_noted)
    plain = tiny.run_config(tiny_model, tiny_rows, tmp_path, training={"steps": 3, "batch_size": 4})
    own = replace(plain, training=replace(plain.training, compiled="aot_eager"))
    for partition in (0, 1):
        job = FitJob(round=1, partition=partition, frozen=(), position=0)
        (one, start), (other, _) = ((site.learner, site.learner.start) for site in _sites(plain, own, partition))
        expected, found = one.fit(start, job), other.fit(start, job)
        for key, value in expected.after.items():
            np.testing.assert_allclose(found.after[key], value, rtol=1e-4, atol=1e-5)
        assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)
    assert noted == ["aot_eager"] * 2


def _sites(plain: Any, own: Any, partition: int) -> Any:
    return (site_of(resolve(config), partition) for config in (plain, own))


def test_a_model_is_as_it_was_after() -> None:
    model = nn.Linear(2, 2)
    with compiled(model, "aot_eager"):
        assert "_compiled_call_impl" in model.__dict__
        assert model(torch.ones(1, 2)).shape == (1, 2)
    assert "_compiled_call_impl" not in model.__dict__


def test_what_torch_does_not_compile_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise BackendCompilerFailed(fails, RuntimeError("no working C++ compiler"), None)

    monkeypatch.setattr("torch.compile", lambda *_, **__: fails)
    model = nn.Linear(2, 2)
    with pytest.raises(PlanError, match=r"training\.compiled: .* found .*no working C\+\+.*; set training\.compiled"):  # noqa: SIM117
        with compiled(model, "inductor"):
            model(torch.ones(1, 2))
    assert "_compiled_call_impl" not in model.__dict__


def test_backends_are_known_and_what_is_not_compiled_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of inductor, aot_eager, found 'fast'"):
        TrainingConfig(compiled="fast")
    for more in (
        "compute.cohort=auto",
        "training.cache_gigabytes=1",
        "privacy.mechanism=example",
    ):
        with pytest.raises(ConfigError, match=r"training\.compiled: expected compute\.cohort = \"off\""):
            override(RunConfig(), ["training.compiled=inductor", more])
    assert override(RunConfig(), ["training.compiled=inductor"]).training.compiled == "inductor"
