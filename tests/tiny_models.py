"""Random models of each architecture: two layers, sixteen features, no dropout, and no bias or norm that is trivial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

WORDS = 40
CLASSES = 3
LENGTH = 6


def bert(seed: int = 0) -> Any:
    return _made(transformers.BertForSequenceClassification, transformers.BertConfig(**_ENCODER), seed)


def roberta(seed: int = 0) -> Any:
    settings = transformers.RobertaConfig(**_ENCODER, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return _made(transformers.RobertaForSequenceClassification, settings, seed)


def distilbert(seed: int = 0) -> Any:
    settings = transformers.DistilBertConfig(
        vocab_size=WORDS,
        dim=16,
        hidden_dim=24,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.2,
        num_labels=CLASSES,
    )
    return _made(transformers.DistilBertForSequenceClassification, settings, seed)


def llama(seed: int = 0, *, biases: bool = False) -> Any:
    """Without biases, as it is published, unless they are asked for."""
    settings = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.2,
        attention_bias=biases,
        mlp_bias=biases,
    )
    return _made(transformers.LlamaForCausalLM, settings, seed)


def gpt2(seed: int = 0) -> Any:
    settings = transformers.GPT2Config(
        vocab_size=WORDS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _made(transformers.GPT2LMHeadModel, settings, seed)


def t5(seed: int = 0) -> Any:
    settings = transformers.T5Config(
        vocab_size=WORDS,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return _made(transformers.T5ForConditionalGeneration, settings, seed)


def vit(seed: int = 0) -> Any:
    return _made(transformers.ViTForImageClassification, transformers.ViTConfig(**_IMAGES, num_labels=CLASSES), seed)


def dinov2(seed: int = 0) -> Any:
    """A backbone without a head, as it is published."""
    return _made(transformers.Dinov2Model, transformers.Dinov2Config(**_IMAGES, mlp_ratio=2), seed)


MODELS: Mapping[str, Callable[..., Any]] = {
    "bert": bert,
    "roberta": roberta,
    "distilbert": distilbert,
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
    "dinov2": dinov2,
}


def batch(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the forward of a model of this kind takes: three rows, and labels where it has a head."""
    random = torch.Generator().manual_seed(1000 + seed)
    if kind in ("vit", "dinov2"):
        inputs = {"pixel_values": torch.randn(3, 3, 16, 16, generator=random)}
    else:
        ids = torch.randint(3, WORDS, (3, LENGTH), generator=random)
        ids[1, LENGTH - 2 :] = 0
        inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if kind in ("llama", "gpt2", "t5"):
        return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == 0, -100)}
    if kind == "dinov2":
        return inputs
    return {**inputs, "labels": torch.randint(0, CLASSES, (3,), generator=random)}


def outputs(model: Any, kind: str, seed: int = 0) -> torch.Tensor:
    """The logits of a batch, or the features where the model has no head, in the mode that the model is in."""
    made = model(**batch(kind, seed))
    return made.logits if "logits" in made else made.last_hidden_state


def loss(model: Any, kind: str, seed: int = 0) -> torch.Tensor:
    """What a step of training lowers."""
    made = model(**batch(kind, seed))
    return made.loss if "loss" in made else (made.last_hidden_state - 1).square().mean()


_ENCODER: Mapping[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
    "num_labels": CLASSES,
}
_IMAGES: Mapping[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


def _made(kind: Any, settings: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(settings).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model
