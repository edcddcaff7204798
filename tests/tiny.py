"""A random BERT of six thousand numbers, a tokenizer of thirty words, and rows to learn from, all made here."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fedpeft import experiment, models
from fedpeft.adapters import AdapterState
from fedpeft.config import RunConfig, from_tree
from fedpeft.config.adapters import HeadOnly, Ia3, Lora, PromptTuning
from fedpeft.config.tasks import Head
from fedpeft.config.training import ModelConfig
from fedpeft.engines.local import LocalTransport
from fedpeft.experiment import site_of
from fedpeft.memory import FolderMemory
from fedpeft.models import AdaptedModel
from fedpeft.randomness import rng
from fedpeft.runs import RunFolder

WORDS = ("good", "bad", "fine", "poor", "great", "dull", "film", "shop", "news", "tweet", "very", "not", "so", "the")
LABELS = ("no", "maybe", "yes")
HEAD = Head("AutoModelForSequenceClassification", "SEQ_CLS", LABELS)
FAMILIES = {
    "lora": Lora(rank=3, alpha=5.0),
    "ia3": Ia3(),
    "prompt_tuning": PromptTuning(virtual_tokens=4),
    "head_only": HeadOnly(),
}


def build(folder: Path, *, labels: int = 0, seed: int = 0) -> Path:
    """A model and a tokenizer in `folder`; with `labels`, a classification head of that many outputs."""
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=32)
    settings = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        initializer_range=0.2,
        num_labels=labels or 2,
    )
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(seed)
        kind = transformers.BertForSequenceClassification if labels else transformers.BertModel
        kind(settings).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return folder


def load(source: Path, family: str | Any = "lora", seed: int = 0, **model: Any) -> AdaptedModel:
    settings = FAMILIES[family] if isinstance(family, str) else family
    return models.load(ModelConfig(source=str(source), device="cpu", **model), settings.build(), HEAD, seed)


def batch() -> dict[str, torch.Tensor]:
    """Three texts, the second padded."""
    ids = torch.tensor([[2, 5, 6, 9, 3], [2, 7, 3, 0, 0], [2, 12, 13, 14, 3]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch()).logits


def moved(state: AdapterState, seed: int = 3) -> AdapterState:
    """The adapter with a random number added to each of its own."""
    random = rng(seed, "moved")
    return AdapterState(
        state.spec,
        {key: (v + 0.3 * random.standard_normal(v.shape)).astype(np.float32) for key, v in state.tensors.items()},
    )


def write_rows(path: Path, rows: int = 90) -> Path:
    """Rows of two groups whose label is told by one of their words."""
    random, lines = rng(0, "rows"), []
    for at in range(rows):
        label = at % 3
        words = [WORDS[2 * label + int(random.integers(2))], *random.choice(WORDS[6:], 2 + at % 5), f"{at}"]
        lines.append({"text": " ".join(words), "label": LABELS[label], "kind": ("films", "shops")[at % 2]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_config(source: Path, rows: Path, out: Path, **changes: Any) -> RunConfig:
    """A run of three sites and four rounds that takes a second; `changes` are top-level tables."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "out": str(out),
        "seed": 5,
        "rounds": 4,
        "model": {"source": str(source), "device": "cpu"},
        "adapter": {"family": "lora", "lora": {"rank": 3, "alpha": 5.0}, "prompt_tuning": {"virtual_tokens": 4}},
        "task": {"kind": "sequence_classification", "sequence_classification": {"max_tokens": 16}},
        "data": {
            "origin": {"source": "jsonl", "jsonl": {"path": str(rows), "columns": {"group": "kind"}}},
            "test_fraction": 0.2,
        },
        "federation": {"clients": 3, "cohort": 2},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "compute": {"threads": 1},
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return experiment.resolve(from_tree(tree))


def transport(config: RunConfig, folder: RunFolder) -> LocalTransport:
    memories = FolderMemory(folder.memories)
    return LocalTransport(config.federation.clients, lambda partition: site_of(config, partition), memories)
