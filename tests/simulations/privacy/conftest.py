from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedpeft.config import RunConfig
from simulations.privacy.recording import Recorded, record
from tests import tiny


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path, tiny_rows: Path) -> Callable[..., RunConfig]:
    """Settings of a run of three sites on the tiny model, with changes."""

    def made(**changes: Any) -> RunConfig:
        return tiny.run_config(tiny_model, tiny_rows, Path("nowhere"), **changes)

    return made


@pytest.fixture(scope="session")
def recorded(tiny_config: Callable[..., RunConfig]) -> tuple[RunConfig, Recorded]:
    """A recorded run of three rounds, whose sites are not asked for all of their rows."""
    config = tiny_config(rounds=3, evaluation={"every": 0}, data={"partition": {"most_rows": 12}})
    return config, record(config)


@pytest.fixture(scope="session")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with four times as many features, so that its words are as far apart as those of a real one."""
    folder = tmp_path_factory.mktemp("wide-model")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    settings = transformers.BertConfig.from_pretrained(str(tiny_model), hidden_size=64)
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        transformers.BertModel(settings).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose labels are drawn by chance: who knows them has seen them."""
    path, draw = tmp_path_factory.mktemp("secrets") / "rows.jsonl", random.Random(1)
    texts = {" ".join(draw.choice(tiny.WORDS) for _ in range(6)) for _ in range(240)}
    rows = [{"text": text, "label": draw.choice(tiny.LABELS), "kind": "films"} for text in sorted(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
