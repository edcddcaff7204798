"""Settings of the tasks, what each needs of a base, and the table of their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from fedpeft.config.fields import Table, require, require_range


@dataclass(frozen=True)
class Head:
    """What a task needs of a base.

    `auto` is the class of transformers that loads the base with the task's last layer, `task_type` what peft calls
    the task (empty: nothing), `labels` the outputs of a last layer of the task's own, in order (empty: it has none).
    """

    auto: str
    task_type: str = ""
    labels: tuple[str, ...] = ()


class TaskSettings(Protocol):
    """What every task's settings say.

    `roles` are those of the columns that the task reads of a row: the first tells rows apart, and `label`, where it
    is among them, is what partitions skew. `metrics` are the figures that it measures, the main one first.
    """

    @property
    def roles(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def metrics(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def head(self) -> Head: ...  # noqa: D102


@dataclass(frozen=True)
class SequenceClassification:
    """One label for each text; `labels` in the order of the head's outputs, empty to take them from the data."""

    roles: ClassVar[tuple[str, ...]] = ("text", "label")
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "loss")

    labels: tuple[str, ...] = ()
    max_tokens: int = 128

    def __post_init__(self) -> None:
        require(len(set(self.labels)) == len(self.labels), "labels", expected="distinct names", found=self.labels)
        require(len(self.labels) != 1, "labels", expected="two names or more, or none", found=self.labels)
        require_range(self, "max_tokens", 8)

    @property
    def head(self) -> Head:
        """What the task needs of a base."""
        return Head("AutoModelForSequenceClassification", "SEQ_CLS", self.labels)


@dataclass(frozen=True)
class TokenClassification:
    """A tag for each word, in BIO: `O`, and `B-KIND` and `I-KIND` for the first and the other words of an entity.

    `labels` in the order of the head's outputs, empty to take the kinds from the data.
    """

    roles: ClassVar[tuple[str, ...]] = ("words", "tags")
    metrics: ClassVar[tuple[str, ...]] = ("entity_f1", "accuracy", "loss")

    labels: tuple[str, ...] = ()
    max_tokens: int = 128

    def __post_init__(self) -> None:
        require(len(set(self.labels)) == len(self.labels), "labels", expected="distinct names", found=self.labels)
        require(len(self.labels) != 1, "labels", expected="two names or more, or none", found=self.labels)
        for label in self.labels:
            require(is_bio(label), "labels", expected="O, B-KIND and I-KIND", found=label)
        require_range(self, "max_tokens", 8)

    @property
    def head(self) -> Head:
        """What the task needs of a base."""
        return Head("AutoModelForTokenClassification", "TOKEN_CLS", self.labels)


def is_bio(tag: str) -> bool:
    """Whether `tag` is `O`, `B-KIND` or `I-KIND`."""
    return tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)


@dataclass(frozen=True)
class CausalLM:
    """An answer to a prompt: instruction tuning of a decoder.

    Rows have a `text` and an `answer`, or, with `form = "messages"`, a conversation whose last turn is the answer.
    A prompt is put into words by the tokenizer's chat template, or, where it has none or `chat` is false, by
    `template`, in which `{text}` stands for it. A prompt that is too long for `max_tokens` loses its beginning; an
    answer is never cut, but refused where it alone is too long (a batch is as wide as its longest row, so a high
    bound costs nothing where rows are short).

    The loss is over the answer's tokens, and without `answer_only` over the prompt's too. With `packing`, the texts
    of a batch are laid one after another into as few rows as hold them; each text still sees itself alone.
    `sample_tokens` bounds the answers that samples show.
    """

    form: str = "prompt"
    max_tokens: int = 512
    answer_only: bool = True
    packing: bool = False
    chat: bool = True
    template: str = "{text}\n"
    sample_tokens: int = 64

    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy", "loss")

    def __post_init__(self) -> None:
        known = ("prompt", "messages")
        require(self.form in known, "form", expected=f"one of {', '.join(known)}", found=self.form)
        require(self.template.count("{text}") == 1, "template", expected="{text} once", found=self.template)
        require_range(self, "max_tokens", 8)
        require_range(self, "sample_tokens", 1)

    @property
    def roles(self) -> tuple[str, ...]:
        """A prompt and its answer, or a conversation."""
        return ("messages",) if self.form == "messages" else ("text", "answer")

    @property
    def head(self) -> Head:
        """What the task needs of a base."""
        return Head("AutoModelForCausalLM", "CAUSAL_LM")


@dataclass(frozen=True)
class Seq2Seq:
    """A target text for each text, by an encoder and a decoder.

    A text is cut at `max_tokens`; a target longer than `max_target_tokens` is refused. With `exact_match`, an
    evaluation also answers every text greedily and counts the answers that are the target to the letter.
    """

    max_tokens: int = 512
    max_target_tokens: int = 128
    exact_match: bool = False

    roles: ClassVar[tuple[str, ...]] = ("text", "target")

    def __post_init__(self) -> None:
        require_range(self, "max_tokens", 8)
        require_range(self, "max_target_tokens", 2)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures that it measures, the main one first."""
        return ("perplexity", "token_accuracy", "loss", *(("exact_match",) if self.exact_match else ()))

    @property
    def head(self) -> Head:
        """What the task needs of a base."""
        return Head("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class ImageClassification:
    """One label for each image; `labels` in the order of the head's outputs, empty to take them from the data.

    Images are brought to `image_size` pixels a side (0: what the base is made for). With `flip`, in training each
    is mirrored left to right or not, by a fair coin.
    """

    labels: tuple[str, ...] = ()
    image_size: int = 0
    flip: bool = False

    roles: ClassVar[tuple[str, ...]] = ("image", "label")
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "loss")

    def __post_init__(self) -> None:
        require(len(set(self.labels)) == len(self.labels), "labels", expected="distinct names", found=self.labels)
        require(len(self.labels) != 1, "labels", expected="two names or more, or none", found=self.labels)
        require_range(self, "image_size", 0)

    @property
    def head(self) -> Head:
        """What the task needs of a base."""
        return Head("AutoModelForImageClassification", "", self.labels)


@dataclass(frozen=True)
class Preference:
    """Of two answers to a prompt the one that people prefer: direct preference optimisation (DPO) of a decoder.

    Rows have a `text`, a `chosen` and a `rejected` answer. `beta` is how dear it is to move away from the base, and
    `label_smoothing` the share of rows that are taken to be the wrong way round. The prompt is put into words as in
    `CausalLM`; `sample_tokens` bounds the answers that samples show.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    max_tokens: int = 256
    chat: bool = True
    template: str = "{text}\n"
    sample_tokens: int = 64

    roles: ClassVar[tuple[str, ...]] = ("text", "chosen", "rejected")
    metrics: ClassVar[tuple[str, ...]] = ("reward_accuracy", "margin", "loss")

    def __post_init__(self) -> None:
        require(self.beta > 0, "beta", expected="a number above 0", found=self.beta)
        require_range(self, "label_smoothing", 0.0, 0.5)
        require(self.template.count("{text}") == 1, "template", expected="{text} once", found=self.template)
        require_range(self, "max_tokens", 8)
        require_range(self, "sample_tokens", 1)

    @property
    def head(self) -> Head:
        """What the task needs of a base."""
        return Head("AutoModelForCausalLM", "CAUSAL_LM")


TASKS = Table(
    "kind",
    {
        "sequence_classification": SequenceClassification,
        "token_classification": TokenClassification,
        "causal_lm": CausalLM,
        "seq2seq": Seq2Seq,
        "image_classification": ImageClassification,
        "preference": Preference,
    },
)
