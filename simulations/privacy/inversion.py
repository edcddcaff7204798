"""Gradient inversion: the words of a client's batch, out of what the client sends.

Source: DAGER, Petrov et al. 2024, section 4 (see `simulations.privacy.spans` for what is taken of it). It needs
low-rank modules that read single words: those of the first layer's attention. Words are found, not their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedpeft.adapters import AdapterState, norm
from fedpeft.config import RunConfig
from fedpeft.config.fields import require, require_range
from fedpeft.evaluation import padding
from fedpeft.experiment import deal_rows
from fedpeft.models import extract, install, trained
from fedpeft.randomness import rng
from fedpeft.tasks import Encoded
from simulations.privacy import spans
from simulations.privacy.figures import Interval, bootstrap, rate, threshold_at
from simulations.privacy.findings import Finding, found
from simulations.privacy.inputs import Inputs, first_inputs
from simulations.privacy.recording import Recorded, public_of, record, require_views
from simulations.privacy.spans import Evidence
from simulations.privacy.views import Aggregate, ClientDelta, Public

UPDATES = ("sent", "gradient")
_PUBLIC_ROWS = 200
_COMMON = 0.9
"""A word that this share of public rows has is no secret: it begins every text, or belongs to a template."""

_MOST_PICKS = 256
"""As many words are sought in an update at most, and in an aggregate, which does not say how many there are."""


@dataclass(frozen=True)
class Inversion:
    """Which updates are attacked, and what protects them.

    `view` is `client` or `aggregate`. `update` is what was `sent`, or in its place one plain `gradient` step on the
    first batch, which is the most that a client could have given away: AdamW takes nearly the sign of each number, and
    further steps mix batches. The `most` updates of the fewest tokens are attacked, of rounds after `after` (in the
    first round of LoRA B is 0, so A does not move). `false_positives` is the share of words that no batch had and that
    may be taken for some that it had. With `clip_norm`, updates are clipped to it and get Gaussian noise of
    `noise_multiplier` times it before they are seen, as by clients who protect themselves.
    """

    view: str = "client"
    update: str = "sent"
    most: int = 6
    after: int = 1
    false_positives: float = 1e-3
    clip_norm: float = 0.0
    noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        require(self.view in ("client", "aggregate"), "view", expected="client or aggregate", found=self.view)
        require(self.update in UPDATES, "update", expected=f"one of {', '.join(UPDATES)}", found=self.update)
        require(
            self.update == "sent" or self.view == "client",
            "update",
            expected="sent, with the view aggregate",
            found=self.update,
            remedy="choose the view client",
        )
        require_range(self, "most", 1)
        require_range(self, "after", 0)
        require_range(self, "false_positives", 0.0, 1.0)
        require_range(self, "clip_norm", 0.0)
        require_range(self, "noise_multiplier", 0.0)

    @property
    def adversary(self) -> str:
        """What the attacker has, in words."""
        seen = {"client": "one client's delta", "aggregate": "one round's aggregate"}[self.view]
        how = {"sent": "as sent", "gradient": "one gradient step"}[self.update]
        return f"{seen}, {how}{', clipped and noised' if self.clip_norm else ''}"

    def run(self, config: RunConfig) -> list[Finding]:
        """What is found in a run of `config`.

        Raises:
            FedPeftError: the run failed, or has no update that can be attacked.
        """
        recorded = record(config)
        public = public_of(config, deal_rows(config).test[:_PUBLIC_ROWS])
        chosen = _chosen(self, config, recorded)
        views = [_protected(view, self, config.seed) for view, _ in chosen]
        scores = words_in(views, public)
        return list(judged(self, scores, [batch for _, batch in chosen], public, rank_of(views[0])))


def words_in(views: Sequence[ClientDelta | Aggregate], public: Public) -> list[np.ndarray]:
    """For each update, how much each word of the vocabulary looks like one of its batch, `(words,)` (see `search`).

    As many words are sought as the client says that it read; texts are taken to be no longer than public ones.

    Raises:
        PlanError: no module reads single words.
    """
    adapters = [view.received if isinstance(view, ClientDelta) else view.before for view in views]
    claimed = [view.tokens if isinstance(view, ClientDelta) else _MOST_PICKS for view in views]
    inputs = first_inputs(public.adapted, adapters[0], min(_longest(public), max(claimed)))
    whitening = inputs.whitening()
    pieces = [_evidence(view.delta, adapter, inputs, whitening) for view, adapter in zip(views, adapters, strict=True)]
    most = [min(_MOST_PICKS, count) for count in claimed]
    return spans.search(pieces, lambda position: inputs.at(position) @ whitening, inputs.positions, most)


def judged(
    settings: Inversion, scores: Sequence[np.ndarray], batches: Sequence[Sequence[Encoded]], public: Public, rank: int
) -> list[Finding]:
    """What the scores come to beside the batches that were really trained on."""
    known = common_words(public)
    hits = tokens = right = picked = 0
    loads = []
    for found_words, batch in zip(scores, batches, strict=True):
        every = {token for example in batch for token in _tokens(example)}
        secret, others = sorted(every - known), sorted(set(range(len(found_words))) - every - known)
        threshold = threshold_at(found_words[others], settings.false_positives)
        hits, tokens = hits + int((found_words[secret] > threshold).sum()), tokens + len(secret)
        picks = set(np.flatnonzero(found_words > 1).tolist()) - known
        right, picked = right + len(picks & set(secret)), picked + len(picks)
        loads.append(len(every) / rank)
    shares = [
        (f"words found, {settings.false_positives:.3g} of others taken for them", rate(hits, tokens), tokens),
        ("words found by pursuit", rate(right, tokens), tokens),
        ("of words found by pursuit, right", rate(right, picked), picked),
        ("distinct words over rank", Interval(*bootstrap(np.array(loads), np.mean)), len(loads)),
    ]
    return [found("inversion", settings.adversary, metric, interval, n) for metric, interval, n in shares]


def common_words(public: Public) -> set[int]:
    """The words that are in nearly every text, which nobody needs to find."""
    special = set(getattr(public.adapted.tokenizer, "all_special_ids", ()))
    examples = public.task.encode(public.rows, public.adapted.tokenizer, "public rows")
    counts = Counter(token for example in examples for token in set(_tokens(example)))
    return special | {token for token, count in counts.items() if count >= _COMMON * len(examples)}


def one_step(config: RunConfig, view: ClientDelta, batch: Sequence[Encoded]) -> ClientDelta:
    """The answer of a client that takes one plain gradient step on `batch`, of the run's learning rate."""
    public = public_of(config)
    adapted, task = public.adapted, public.task
    install(adapted, view.received)
    before = extract(adapted).tensors
    parameters = {key: value for key, value in trained(adapted).items() if key.split("/")[0] in view.delta}
    adapted.model.train()
    loss = task.loss(adapted.model, task.collate(list(batch), padding(adapted), adapted.device))
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            if gradient is not None:
                parameter.sub_(gradient, alpha=config.training.learning_rate)
    after = extract(adapted).tensors
    delta = {key: after[key] - before[key] for key in view.delta}
    return replace(view, delta=delta, examples=len(batch), tokens=sum(example.size for example in batch))


def rank_of(view: ClientDelta | Aggregate) -> int:
    """The greatest rank of a low-rank module in the update."""
    adapter = view.received if isinstance(view, ClientDelta) else view.before
    return max(module.rank for module in adapter.spec.modules)


def _evidence(
    delta: Mapping[str, np.ndarray], adapter: AdapterState, inputs: Inputs, whitening: np.ndarray
) -> list[Evidence]:
    """What moved in the first layers: all that A did, or where A stood still, B module by module."""
    moved = [delta[f"{path}.A"] for path in inputs.paths if np.any(delta.get(f"{path}.A", 0))]
    if moved:
        return [spans.of_a(moved, whitening)]
    standing = [path for path in inputs.paths if np.any(delta.get(f"{path}.B", 0))]
    return [spans.of_b(delta[f"{path}.B"], adapter.tensors[f"{path}.A"], whitening) for path in standing]


def _chosen(
    settings: Inversion, config: RunConfig, recorded: Recorded
) -> list[tuple[ClientDelta | Aggregate, tuple[Encoded, ...]]]:
    """The updates that are attacked, each with what it was really trained on."""
    if settings.view == "aggregate":
        pairs: list[Any] = [(view, _of_round(recorded, view.round)) for view in recorded.aggregates]
    else:
        pairs = [(view, recorded.batches.get((view.round, view.partition), ())) for view in recorded.clients]
    first = config.training.batch_size if settings.update == "gradient" else None
    pairs = [(view, batch[:first]) for view, batch in pairs if view.round > settings.after and batch]
    require_views(pairs, settings.view)
    fewest = sorted(pairs, key=lambda pair: sum(example.size for example in pair[1]))[: settings.most]
    return [(one_step(config, view, batch), batch) for view, batch in fewest] if first else fewest


def _of_round(recorded: Recorded, round_: int) -> tuple[Encoded, ...]:
    return tuple(example for (at, _), batch in recorded.batches.items() if at == round_ for example in batch)


def _protected(view: ClientDelta | Aggregate, settings: Inversion, seed: int) -> Any:
    """The update as somebody sees it who is sent it clipped and noised."""
    if not settings.clip_norm or isinstance(view, Aggregate):
        return view
    factor = min(1.0, settings.clip_norm / max(norm(view.delta), 1e-30))
    random, deviation = rng(seed, "noise", view.round, view.partition), settings.noise_multiplier * settings.clip_norm
    noisy = {
        key: (factor * value + deviation * random.standard_normal(value.shape)).astype(np.float32)
        for key, value in view.delta.items()
    }
    return replace(view, delta=noisy)


def _longest(public: Public) -> int:
    """The longest of the public rows, in tokens."""
    examples = public.task.encode(public.rows, public.adapted.tokenizer, "public rows")
    return max(len(_tokens(example)) for example in examples)


def _tokens(example: Encoded) -> Sequence[int]:
    tokens: Sequence[int] = getattr(example, "tokens", ())
    return tokens
