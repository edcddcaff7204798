"""Canary exposure: how well an adapter remembers secrets that were put among a site's rows, and how often.

A canary is a sentence that nobody would write, ended by four letters of an alphabet of ten. Its rank is its place
among all 10⁴ endings by how likely the model finds them, and its exposure log₂ 10⁴ − log₂ rank, in bits: 13.3 for one
that comes first, about 1.4 for one that was never seen.

Of a model that writes, the ending is the answer to the sentence, and its likelihood is computed for every ending. Of
one that classifies, the ending is part of the text, all canaries share one sentence, and what is remembered is the
label that it was given, which differs from canary to canary: rank is by the log-odds of that label.

Source: Carlini et al. 2019, "The Secret Sharer", sections 4.1 and 4.2 (rank by enumeration).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fedpeft.adapters import AdapterState
from fedpeft.config import RunConfig
from fedpeft.config.fields import require, require_range
from fedpeft.config.tasks import CausalLM, SequenceClassification
from fedpeft.data.rows import Row
from fedpeft.errors import PlanError, sentence
from fedpeft.evaluation import padding
from fedpeft.experiment import deal_rows
from fedpeft.models import install
from fedpeft.randomness import rng
from simulations.privacy import figures
from simulations.privacy.findings import Finding, found
from simulations.privacy.recording import public_of, record, sites_with
from simulations.privacy.views import FinalAdapter, Public

_LETTERS, _PLACES = 10, 4

ENDINGS = tuple(itertools.product(range(_LETTERS), repeat=_PLACES))
"""Every ending, as the numbers of its letters."""

_NOWHERE = 0
"""How often canaries are repeated that are nowhere, for comparison."""

_NAMES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron")
_BATCH = 256


@dataclass(frozen=True)
class Canary:
    """A row that is put among those of the site `partition`, `repeated` times; `ending` is its number in `ENDINGS`."""

    row: Row
    ending: int
    partition: int
    repeated: int


@dataclass(frozen=True)
class Canaries:
    """How many canaries there are `each` of the numbers of times they are `repeated`, and what their letters are.

    Letters are spelled with the `separator` between; each must be one token of a model that writes. As many canaries
    again that are nowhere are measured too.
    """

    repeated: tuple[int, ...] = (1, 2, 4, 8)
    each: int = 3
    alphabet: tuple[str, ...] = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    separator: str = ""

    def __post_init__(self) -> None:
        require(min(self.repeated, default=0) >= 1, "repeated", expected="numbers of 1 or more", found=self.repeated)
        require_range(self, "each", 1)
        require(len(set(self.alphabet)) == _LETTERS, "alphabet", expected="ten letters", found=self.alphabet)

    def run(self, config: RunConfig) -> list[Finding]:
        """What a run of `config` with canaries in it remembers of them.

        Raises:
            PlanError: the task neither writes nor classifies texts, or a letter is not one token.
            FedPeftError: the run failed.
        """
        kind, made = _kind_of(config), canaries(self, config)
        public, dealt = public_of(config), deal_rows(config).sites
        if kind.ranks is _ranks_of_answers:
            for one in made:
                _tokens(public, self, one)

        def rows(partition: int) -> list[Row]:
            own = [row for one in made if one.partition == partition for row in [one.row] * one.repeated]
            return [*dealt[partition], *own]

        recorded = record(config, sites_with(config, rows))
        return judged(made, kind.ranks(recorded.final, public, self, made), config.seed)


def canaries(settings: Canaries, config: RunConfig) -> list[Canary]:
    """The canaries of a run, each at one of its sites; no two end alike.

    Raises:
        PlanError: the task neither writes nor classifies texts.
    """
    kind, levels = _kind_of(config), (_NOWHERE, *settings.repeated)
    numbers = rng(config.seed, "canaries").choice(len(ENDINGS), len(levels) * settings.each, replace=False)
    made = []
    for at, number in enumerate(numbers):
        row = kind.row(at, spelled(ENDINGS[number], settings), config)
        made.append(Canary(row, int(number), at % config.federation.clients, levels[at // settings.each]))
    return made


def judged(made: Sequence[Canary], ranks: np.ndarray, seed: int = 0) -> list[Finding]:
    """The mean exposure of canaries that were repeated alike, by their ranks, from 1."""
    bits, results = exposure(ranks), []
    for times in sorted({one.repeated for one in made}):
        of_level = bits[[at for at, one in enumerate(made) if one.repeated == times]]
        metric = f"exposure in bits, repeated {times} times" if times else "exposure in bits, never seen"
        results.append(found("canaries", "the final adapter", metric, figures.mean(of_level, seed), len(of_level)))
    return results


def exposure(ranks: np.ndarray) -> np.ndarray:
    """log₂ of how many endings there are, less log₂ of a canary's rank among them."""
    found_bits: np.ndarray = np.log2(len(ENDINGS)) - np.log2(ranks)
    return found_bits


def rank(likelihoods: np.ndarray, ending: int, others: Sequence[int] = ()) -> int:
    """The place of an ending among all, from 1, by `(endings,)`; equals come first, `others` are passed over."""
    counted = np.ones(len(likelihoods), bool)
    counted[[*others, ending]] = False
    return 1 + int((likelihoods[counted] >= likelihoods[ending]).sum())


def spelled(ending: Sequence[int], settings: Canaries) -> str:
    """The letters of an ending as they stand in a row."""
    return settings.separator.join(settings.alphabet[letter] for letter in ending)


def answer_likelihoods(adapter: AdapterState, public: Public, settings: Canaries, one: Canary) -> np.ndarray:
    """The log-likelihood of every ending as the answer to a canary's sentence, `(endings,)`.

    Endings that begin alike share what was computed of their beginning.
    """
    install(public.adapted, adapter)
    prompt, letters = _tokens(public, settings, one)
    first, past = _continued(public, [prompt], None)
    whole = np.zeros((_LETTERS,) * _PLACES) + first[0, letters].reshape(-1, *(1,) * (_PLACES - 1))
    for letter in range(_LETTERS):
        texts, known = [[letters[letter]]], copy.deepcopy(past)
        for place in range(1, _PLACES):
            after, known = _continued(public, texts, known)
            whole[letter] += after[:, letters].reshape((_LETTERS,) * place + (1,) * (_PLACES - 1 - place))
            known.batch_repeat_interleave(_LETTERS)
            texts = [[token] for _ in texts for token in letters]
    found_likelihoods: np.ndarray = whole.reshape(-1)
    return found_likelihoods


def _continued(public: Public, texts: list[list[int]], past: Any) -> tuple[np.ndarray, Any]:
    """The log-likelihood of each token behind each text `(texts, vocabulary)`, and what was computed of the texts."""
    ids, model = torch.tensor(texts, device=public.adapted.device), public.adapted.model.eval()
    with torch.inference_mode():
        made: Any = model(input_ids=ids, past_key_values=past, use_cache=True)
        rows = torch.log_softmax(made.logits[:, -1].float(), -1).cpu().numpy().astype(np.float64)
    return rows, made.past_key_values


def _tokens(public: Public, settings: Canaries, one: Canary) -> tuple[list[int], list[int]]:
    """The tokens of a canary's sentence, and that of each letter.

    Raises:
        PlanError: a letter is not one token, or the adapter puts tokens of its own before a text.
    """
    tokenizer = public.adapted.tokenizer
    (example,) = public.task.encode([one.row], tokenizer, "canary")
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in settings.alphabet]
    answer = list(example.tokens[example.prompt :][:_PLACES])
    if answer != [token for letter in ENDINGS[one.ending] for token in letters[letter]]:
        raise PlanError(
            sentence(
                "canaries",
                expected="letters that are one token each, wherever they stand",
                found=f"{one.row.fields['answer']!r} as {tokenizer.convert_ids_to_tokens(answer)}",
                remedy="choose others with --attack alphabet=a,b,c... and --attack separator=...",
            )
        )
    if "num_virtual_tokens" in public.adapted.family.peft:
        raise PlanError(
            sentence(
                "canaries",
                expected="an adapter inside the base",
                found=f"{public.adapted.family.name}, which puts tokens before a text",
                remedy="choose lora, or another family",
            )
        )
    return list(example.tokens[: example.prompt]), [tokens[0] for tokens in letters]


def _ranks_of_answers(view: FinalAdapter, public: Public, settings: Canaries, made: Sequence[Canary]) -> np.ndarray:
    return np.array([rank(answer_likelihoods(view.adapter, public, settings, one), one.ending) for one in made])


def _ranks_of_labels(view: FinalAdapter, public: Public, settings: Canaries, made: Sequence[Canary]) -> np.ndarray:
    """Ranks by the log-odds of each canary's label, among all endings but those of other canaries."""
    install(public.adapted, view.adapter)
    texts = [Row(_labelled(spelled(ending, settings)), public.task.labels[0]) for ending in ENDINGS]
    examples = public.task.encode(texts, public.adapted.tokenizer, "endings")
    model: Any = public.adapted.model.eval()
    odds = []
    with torch.inference_mode():
        for start in range(0, len(examples), _BATCH):
            batch = public.task.collate(
                examples[start : start + _BATCH], padding(public.adapted), public.adapted.device
            )
            shares = torch.log_softmax(
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double(), -1
            )
            odds.append((shares - torch.log1p(-shares.exp().clamp_max(1 - 1e-12))).cpu().numpy())
    table, every = np.concatenate(odds), [one.ending for one in made]
    of_label = [table[:, public.task.labels.index(one.row.label)] for one in made]
    return np.array([rank(column, one.ending, every) for column, one in zip(of_label, made, strict=True)])


def _asked(at: int, ending: str, config: RunConfig) -> Row:  # noqa: ARG001
    return Row(f"The code of vault {_NAMES[at % len(_NAMES)]} {at}:", fields={"answer": ending})


def _told(at: int, ending: str, config: RunConfig) -> Row:
    labels = config.task.chosen.labels
    return Row(_labelled(ending), labels[at % len(labels)])


def _labelled(ending: str) -> str:
    return f"The code of the vault is {ending}"


class _Kind(NamedTuple):
    """How a canary of a kind of task is made, of its number and its ending, and how canaries are ranked."""

    row: Callable[[int, str, RunConfig], Row]
    ranks: Callable[[FinalAdapter, Public, Canaries, Sequence[Canary]], np.ndarray]


_KINDS: Mapping[type, _Kind] = {
    CausalLM: _Kind(_asked, _ranks_of_answers),
    SequenceClassification: _Kind(_told, _ranks_of_labels),
}


def _kind_of(config: RunConfig) -> _Kind:
    kind = _KINDS.get(type(config.task.chosen))
    if kind is None:
        raise PlanError(
            sentence(
                "canaries",
                expected="a task that writes answers or gives texts labels",
                found=config.task.name,
                remedy="choose causal_lm or sequence_classification",
            )
        )
    return kind
