"""The table of tasks: which settings class asks for which task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpeft.config.tasks import (
    CausalLM,
    ImageClassification,
    Preference,
    Seq2Seq,
    SequenceClassification,
    TokenClassification,
)
from fedpeft.data.fields import Row
from fedpeft.tasks import (
    causal_lm,
    image_classification,
    preference,
    seq2seq,
    sequence_classification,
    token_classification,
)
from fedpeft.tasks.task import Builder, Task

BUILDERS: Mapping[type, Builder] = {
    SequenceClassification: Builder(sequence_classification.build, sequence_classification.complete),
    TokenClassification: Builder(token_classification.build, token_classification.complete),
    CausalLM: Builder(causal_lm.build),
    Seq2Seq: Builder(seq2seq.build),
    ImageClassification: Builder(image_classification.build, sequence_classification.complete),
    Preference: Builder(preference.build),
}


def build_task(settings: object) -> Task:
    """The task that `settings` describe."""
    return _builder(settings).build(settings)


def with_labels(settings: object, rows: Sequence[Row]) -> object:
    """The settings with what they leave to the data filled in from `rows`."""
    return _builder(settings).complete(settings, rows)


def _builder(settings: object) -> Builder:
    builder = BUILDERS.get(type(settings))
    if builder is None:
        raise TypeError(f"no task for settings of type {type(settings).__name__}")
    return builder
