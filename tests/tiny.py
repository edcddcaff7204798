"""A random BERT of six thousand numbers, a tokenizer of thirty words, and rows to learn from, all made here."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import processors

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


def build_wide(folder: Path) -> Path:
    """The model of `build`, of several megabytes."""
    return build(folder, width=256)


def build(folder: Path, *, labels: int = 0, seed: int = 0, width: int = 16) -> Path:
    """A model and a tokenizer in `folder`; with `labels`, a classification head of that many outputs."""
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=32)
    settings = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24 if width == 16 else 4 * width,
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


def build_llama(folder: Path, *, chat: bool = False, seed: int = 0) -> Path:
    """A decoder and a tokenizer without a pad token; with `chat`, a template of `<s>` and who speaks."""
    tokenizer = _word_tokenizer(bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
            "{% if add_generation_prompt %}<s> assistant : {% endif %}"
        )
    settings = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(transformers.LlamaForCausalLM, settings, tokenizer, folder, seed)


def build_t5(folder: Path, *, seed: int = 0) -> Path:
    """An encoder and a decoder, and a tokenizer that ends every text."""
    tokenizer = _word_tokenizer(eos_token="</s>", pad_token="<pad>")
    ends = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ends)
    settings = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        initializer_factor=1.0,
    )
    return _save(transformers.T5ForConditionalGeneration, settings, tokenizer, folder, seed)


def _word_tokenizer(**special: str) -> Any:
    words = ["<unk>", "<pad>", "<s>", "</s>", ":", "user", "assistant", *LABELS, *WORDS]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", model_max_length=64, **special
    )


def _save(kind: Any, settings: Any, tokenizer: Any, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(seed)
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


def write_answers(path: Path, rows: int = 60, role: str = "answer") -> Path:
    """Rows of two groups, each a text and, under `role`, what is to be said of it: its first word tells."""
    lines = []
    for line in write_rows(path, rows).read_text().splitlines():
        row = json.loads(line)
        lines.append({"text": row["text"], role: f"the {row['label']}", "kind": row["kind"]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_tags(path: Path, rows: int = 60) -> Path:
    """Rows of two groups, each of words and their tags: an opinion may be of two words, a thing is of one."""
    random, lines = rng(0, "tags"), []
    for at in range(rows):
        strong = [("very", "B-opinion")] if at % 2 else []
        opinion = [*strong, (WORDS[int(random.integers(6))], "I-opinion" if strong else "B-opinion")]
        filler = [(word, "O") for word in random.choice(["so", "the", "not", f"{at}"], 1 + at % 4)]
        thing = [(WORDS[6 + int(random.integers(4))], "B-thing")]
        words, tags = zip(*opinion, *filler, *thing, (f"{at}", "O"), strict=True)
        lines.append({"words": words, "tags": tags, "kind": ("films", "shops")[at % 2]})
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
