from __future__ import annotations

import pytest

from fedpeft.config import RunConfig, digest, override
from fedpeft.errors import ConfigError

TELLING = [
    "observation.sinks=tensorboard,prometheus",
    "observation.log_format=json",
    "observation.prometheus.port=9100",
]


def test_what_a_run_tells_is_no_concern_of_its_nodes() -> None:
    assert digest(override(RunConfig(), TELLING)) == digest(RunConfig())


def test_a_sink_has_its_settings() -> None:
    observation = override(RunConfig(), [*TELLING, "observation.mlflow.experiment=lab"]).observation
    assert observation.sinks == ("tensorboard", "prometheus")
    assert observation.settings_of("prometheus").port == 9100
    assert observation.settings_of("mlflow").experiment == "lab"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("observation.sinks=tensorbord", "observation.sinks"),
        ("observation.sinks=wandb,wandb", "observation.sinks"),
        ("observation.log_format=xml", "observation.log_format"),
        ("observation.prometheus.port=70000", "observation.prometheus.port"),
        ("observation.mlflow.experiment= ", "observation.mlflow.experiment"),
        ("observation.wandb.project=", "observation.wandb.project"),
        ("observation.tensorbord.folder=x", "observation.tensorbord"),
    ],
)
def test_a_mistake_names_its_key(text: str, place: str) -> None:
    with pytest.raises(ConfigError, match=f"^{place}: expected"):
        override(RunConfig(), [text])
