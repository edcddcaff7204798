"""Every adapter method on every architecture, with settings that fit sixteen features, and where one cannot go."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fedpeft import models
from fedpeft.adaptation import adapt, describe
from fedpeft.adapters import OWN_KINDS, AdapterState, Family, fixed, together
from fedpeft.config.adapters import ADAPTERS
from fedpeft.config.tasks import Head
from fedpeft.fisher import with_places
from fedpeft.models import AdaptedModel
from fedpeft.penalties import of
from tests import tiny_models

KINDS = ("llama", "bert", "vit", "t5")
"""The architectures: a decoder, an encoder of text, an encoder of images, an encoder and a decoder."""

SOURCE = "tiny"
"""What exports call the base."""

HEADS: Mapping[str, Head] = {
    "llama": Head("AutoModelForCausalLM", "CAUSAL_LM"),
    "bert": Head("AutoModelForSequenceClassification", "SEQ_CLS", ("a", "b", "c")),
    "vit": Head("AutoModelForImageClassification", "", ("a", "b", "c")),
    "t5": Head("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}

_ATTENTION = {
    "llama": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "vit": ("q_proj", "v_proj"),
    "t5": ("q", "v"),
}
_TARGETS: Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "ln_tuning": {
        "llama": {"target_modules": ("input_layernorm", "post_attention_layernorm", "norm")},
        "bert": {"target_modules": ("LayerNorm",)},
        "vit": {"target_modules": ("layernorm_before", "layernorm_after")},
        "t5": {"target_modules": ("layer_norm",)},
    },
    "trainable_tokens": {
        "llama": {"target_modules": ("embed_tokens",)},
        "bert": {"target_modules": ("word_embeddings",)},
        "vit": {},
        "t5": {"target_modules": ("shared",)},
    },
    "ia3": {
        "llama": {"target_modules": ("k_proj", "v_proj", "down_proj"), "feedforward_modules": ("down_proj",)},
        "bert": {"target_modules": ("key", "value", "output.dense"), "feedforward_modules": ("output.dense",)},
        "vit": {"target_modules": ("k_proj", "v_proj", "fc2"), "feedforward_modules": ("fc2",)},
        "t5": {"target_modules": ("k", "v", "wo"), "feedforward_modules": ("wo",)},
    },
}
"""Where a family goes that does not go on attention's queries and values."""

_SMALL: Mapping[str, Mapping[str, Any]] = {
    "lora": {"rank": 3, "alpha": 5.0},
    "lora_sb": {"rank": 3, "alpha": 5.0},
    "adalora": {"rank": 3, "alpha": 5.0},
    "loha": {"rank": 2, "alpha": 3.0},
    "lokr": {"rank": 2, "alpha": 3.0},
    "hira": {"rank": 3},
    "vera": {"rank": 4},
    "randlora": {"rank": 4},
    "tinylora": {"numbers": 5},
    "frod": {"sparse_rate": 0.2},
    "miss": {"rank": 4},
    "fourierft": {"frequencies": 20},
    "waveft": {"frequencies": 20},
    "c3a": {"block_size": 8},
    "shira": {"rank": 2},
    "oft": {"block_size": 8},
    "boft": {"block_size": 4},
    "hra": {"rank": 4},
    "road": {"group_size": 8},
    "trainable_tokens": {"tokens": tuple(range(3, 23))},
    "prompt_tuning": {"virtual_tokens": 3},
    "prefix_tuning": {"virtual_tokens": 3},
    "p_tuning": {"virtual_tokens": 3, "hidden": 8},
    "llama_adapter": {"virtual_tokens": 3, "layers": 1},
    "visual_prompt": {"virtual_tokens": 3},
    "fish_mask": {"share": 0.05},
    "child_tuning": {"share": 0.2, "balanced": True},
    "houlsby": {"size": 4},
    "pfeiffer": {"size": 4},
    "parallel": {"size": 4},
}

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora (DoRA)": ("lora", {"dora": True}),
    "lora (frozen A)": ("lora", {"freeze_a": True}),
    "lora (rank-stabilised)": ("lora", {"rank_stabilised": True}),
    "lora (all-linear)": ("lora", {"target_modules": ("all-linear",)}),
    "lora (patterns)": ("lora", {"patterns": True}),
    "lokr (low-rank W2)": ("lokr", {"rank": 1}),
    "vera (frozen d)": ("vera", {"freeze_d": True}),
    "road (road_2)": ("road", {"variant": "road_2"}),
    "road (road_4)": ("road", {"variant": "road_4"}),
    "prefix_tuning (projected)": ("prefix_tuning", {"hidden": 8}),
    "parallel (AdaptFormer)": ("parallel", {"scale": 0.1}),
}
"""Settings that make another method of a family."""

TOGETHER: Mapping[str, tuple[str, ...]] = {
    "lora+bitfit": ("lora", "bitfit"),
    "parallel+prefix_tuning (MAM)": ("parallel", "prefix_tuning"),
    "houlsby+prompt_tuning": ("houlsby", "prompt_tuning"),
}

METHODS = (*ADAPTERS.members, *VARIANTS, *TOGETHER)

_NO_INPUT = "a language model that reads vectors before its input"
_NO_HEAD = "beside which a task's own last layer can be trained"
_NO_BIAS = "a base with biases"
_NO_LAST = "no last layer of the task's own"
REFUSALS: Mapping[tuple[str, str], str] = {
    **{
        (method, "vit"): _NO_INPUT
        for method in (
            "prompt_tuning",
            "prefix_tuning",
            "prefix_tuning (projected)",
            "p_tuning",
            "parallel+prefix_tuning (MAM)",
            "houlsby+prompt_tuning",
        )
    },
    **{("visual_prompt", kind): "a base that reads images patch by patch" for kind in ("llama", "bert", "t5")},
    ("llama_adapter", "bert"): _NO_INPUT,
    ("llama_adapter", "t5"): _NO_INPUT,
    ("llama_adapter", "vit"): _NO_HEAD,
    ("trainable_tokens", "bert"): _NO_HEAD,
    ("trainable_tokens", "vit"): _NO_HEAD,
    **{(method, kind): _NO_BIAS for method in ("bitfit", "lora+bitfit") for kind in ("llama", "t5")},
    **{("head_only", kind): _NO_LAST for kind in ("llama", "t5")},
}
"""Where a method cannot go, and what the refusal says."""


@dataclass(frozen=True)
class Cell:
    """One method on one architecture."""

    method: str
    kind: str

    @property
    def refusal(self) -> str:
        """Part of the sentence that refuses this cell; empty where it works."""
        return REFUSALS.get((self.method, self.kind), "")

    def __str__(self) -> str:
        return f"{self.method} on {self.kind}"


CELLS = tuple(Cell(method, kind) for method in METHODS for kind in KINDS)
WORKING = tuple(cell for cell in CELLS if not cell.refusal)
REFUSED = tuple(cell for cell in CELLS if cell.refusal)


class Words:
    """A tokenizer that saves nothing."""

    pad_token_id = 0

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Subject:
    """A cell made: the bare base, two models drawn under unlike seeds, and three clients that began at the first's.

    `frozen` are the numbers that nobody trains, of the first model, before its clients were trained.
    """

    cell: Cell
    base: torch.nn.Module
    one: AdaptedModel
    other: AdaptedModel
    clients: tuple[AdapterState, ...]
    frozen: Mapping[str, torch.Tensor]

    @property
    def start(self) -> AdapterState:
        """The adapter as it was drawn."""
        return self.one.initial

    @property
    def kinds(self) -> set[str]:
        """The kinds of its modules, of a head apart."""
        return kinds_of(self.cell)


def family(cell: Cell) -> Family:
    """The family of a cell."""
    if "+" in cell.method:
        names = TOGETHER.get(cell.method) or cell.method.split("+")
        return together([_settings(name, cell.kind, {}).build() for name in names])
    name, more = VARIANTS.get(cell.method, (cell.method, {}))
    made: Family = _settings(name, cell.kind, more).build()
    return made


def kinds_of(cell: Cell) -> set[str]:
    """The kinds of modules that a cell has, of a head apart unless there is nothing else."""
    chosen = family(cell)
    by_peft = {chosen.kind} if chosen.peft else set()
    return by_peft | {OWN_KINDS[method] for method, _ in chosen.own} or {"full"}


def _settings(name: str, kind: str, more: Mapping[str, Any]) -> Any:
    settings = ADAPTERS.members[name]
    told = {**_SMALL.get(name, {}), **more}
    if told.pop("patterns", False):
        first = _ATTENTION[kind][0]
        told |= {"rank_pattern": (f"{first} = 5",), "alpha_pattern": (f"{first} = 7",)}
    if name in _TARGETS:
        told = {**told, **_TARGETS[name][kind]}
    elif name not in OWN_KINDS and "target_modules" in {item.name for item in fields(settings)}:
        told = {"target_modules": _ATTENTION[kind], **told}
    return settings(**told)


def bare(kind: str) -> Any:
    """The base, untouched."""
    model = tiny_models.MODELS[kind](0)
    model.name_or_path = SOURCE
    return model


def made(cell: Cell, seed: int) -> AdaptedModel:
    """A fresh model whose adapter is drawn from `seed`."""
    return of_family(family(cell), cell.kind, seed)


def of_family(chosen: Family, kind: str, seed: int) -> AdaptedModel:
    """A fresh model of a family with any settings."""
    head, base = HEADS[kind], bare(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = adapt(base, chosen, head, SOURCE)
    spec, bindings, coordinates = describe(model, chosen, head)
    empty = AdaptedModel(
        model,
        Words(),
        chosen,
        head,
        spec,
        bindings,
        AdapterState(spec, {}),
        torch.device("cpu"),
        torch.float32,
        sum(parameter.numel() for parameter in bare(kind).parameters()),
        coordinates,
        of(model, chosen),
    )
    drawn = replace(empty, initial=models.extract(empty))
    return replace(drawn, initial=with_places(drawn, _toy_task(kind), range(3))) if chosen.chosen else drawn


def _toy_task(kind: str) -> Any:
    """What `fisher` asks of a task: examples are seeds of random batches."""
    return SimpleNamespace(
        collate=lambda examples, pad, device: examples[0],
        loss=lambda model, seed: tiny_models.loss(model, kind, 100 + seed),
    )


def fitted(
    adapted: AdaptedModel, kind: str, state: AdapterState, seed: int, steps: int = 4, frozen: Sequence[str] = ()
) -> AdapterState:
    """The adapter after `steps` of AdamW from `state` on all but `frozen` tensors, on batches that `seed` chooses."""
    models.install(adapted, state)
    parameters = models.trained(adapted, (*fixed(adapted.spec), *frozen))
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.05, weight_decay=0.0)
    adapted.model.train()
    for step in range(steps):
        optimizer.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            loss = tiny_models.loss(adapted.model, kind, 10 * seed + step)
        (loss if adapted.penalty is None else loss + adapted.penalty()).backward()
        optimizer.step()
    return models.extract(adapted)


def frozen_numbers(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """Copies of all that nobody trains: parameters and what the methods keep beside them, by name."""
    moving = {id(parameter) for parameter in models.trained(adapted, fixed(adapted.spec)).values()}
    found = {n: p for n, p in adapted.model.named_parameters() if id(p) not in moving}
    found |= {n: b for n, b in adapted.model.named_buffers() if not n.endswith((".given", ".start"))}
    return {name: value.detach().clone() for name, value in found.items()}


@functools.lru_cache(maxsize=2)
def subject(cell: Cell, *patterns: str) -> Subject:
    """The cell, made and trained on all tensors but those of `patterns`; the last ones are kept."""
    one = made(cell, 1)
    frozen, still = frozen_numbers(one), one.spec.matching(patterns)
    clients = tuple(fitted(one, cell.kind, one.initial, seed, frozen=still) for seed in (1, 2, 3))
    return Subject(cell, bare(cell.kind).eval(), one, made(cell, 2), clients, frozen)


def logits(model: Any, kind: str) -> torch.Tensor:
    """What the model makes of one batch, in evaluation."""
    model.eval()
    batch = tiny_models.batch(kind, 7)
    labels = batch.pop("labels")
    if kind == "t5":
        batch["decoder_input_ids"] = labels.clamp_min(0)
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    return found
