"""The main job on the real model and data, shortened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedpeft.bases import model_path
from fedpeft.config import RunConfig, load
from fedpeft.engines.local import LocalTransport
from fedpeft.experiment import resolve, site_of
from fedpeft.federate import federate
from fedpeft.memory import FolderMemory
from fedpeft.runs import RunFolder, folder_for

pytestmark = [
    pytest.mark.assets,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

DEMO = Path(__file__).parent.parent / "simulations" / "demo.toml"
FROZEN_ACCURACY = 0.54
"""Held-out accuracy of the frozen encoder with a trained head, in the README's table."""


def run(out: Path, *overrides: str) -> tuple[RunConfig, RunFolder, list[dict[str, Any]]]:
    config = resolve(load(DEMO, [f"out={out}", *overrides]))
    folder = folder_for(config)
    transport = LocalTransport(
        config.federation.clients, lambda partition: site_of(config, partition), FolderMemory(folder.memories)
    )
    return config, folder, federate(config, folder, transport, engine="local")


@pytest.mark.parametrize("family", ["lora", "ia3", "prompt_tuning"])
def test_one_key_switches_the_adapter(tmp_path: Path, family: str) -> None:
    short = ("rounds=1", "training.steps=1", "federation.cohort=2", "data.most_test_rows=20")
    config, folder, records = run(tmp_path / family, f"adapter.family={family}", *short)
    assert records[0]["adapter"]["family"] == family
    assert records[-1]["stopped"] == "completed"

    base = model_path(config.model)
    labels = len(config.task.chosen.labels)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, local_files_only=True)
    adapted = PeftModel.from_pretrained(model, str(folder.adapter)).eval()
    batch = AutoTokenizer.from_pretrained(base, local_files_only=True)(["a fine film"], return_tensors="pt")
    with torch.inference_mode():
        assert adapted(**batch).logits.shape == (1, labels)


@pytest.mark.slow
def test_half_of_the_demo_beats_the_frozen_model_by_five_points(tmp_path: Path) -> None:
    *_, records = run(tmp_path / "demo", "rounds=6", "evaluation.every=0")
    final = records[-1]["evaluation"]
    assert final["accuracy"] > FROZEN_ACCURACY + 0.05
    assert set(final["groups"]) == {"films", "microblog", "newspaper", "shops"}
    assert records[-1]["full_model_bytes"] > 100 * (records[-1]["bytes_up"] + records[-1]["bytes_down"])
