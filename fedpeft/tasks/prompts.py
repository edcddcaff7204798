"""Prompts and answers as tokens: a row put into words by a chat template, or by a plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.config.tasks import CausalLM
from fedpeft.data.fields import Row
from fedpeft.errors import DataError, sentence
from fedpeft.tasks.tokens import require_room

_ANSWERS = "assistant"
"""Who gives the answer in a conversation."""

Turns = Sequence[Mapping[str, str]]
"""A conversation, as chat templates read it: objects with `role` and `content`."""


@dataclass(frozen=True)
class Prompted:
    """A tokenised prompt with its answer: the token ids of both, how many are the prompt's, and the row's group."""

    tokens: tuple[int, ...]
    prompt: int
    group: str

    @property
    def size(self) -> int:
        """Its tokens."""
        return len(self.tokens)


def require_answers(rows: Sequence[Row], settings: CausalLM, place: str) -> None:
    """Raises DataError, naming the row, if it lacks a prompt or an answer."""
    expected, lack = _NEEDS[settings.form]
    for at, row in enumerate(rows):
        if missing := lack(row):
            raise DataError(
                sentence(
                    f"{place}, row {at + 1}",
                    expected=expected,
                    found=missing,
                    remedy="correct the row, or set task.causal_lm.form to what the rows are",
                )
            )


def _lacks_answer(row: Row) -> str:
    return "" if row.fields.get("answer") else "no answer"


def _lacks_turns(row: Row) -> str:
    speakers = [who for who, _ in _pairs(row)]
    if len(speakers) < 2:
        return f"{len(speakers)} messages"
    return "" if speakers[-1] == _ANSWERS else f"the last of the {speakers[-1]}"


_NEEDS: Mapping[str, tuple[str, Callable[[Row], str]]] = {
    "prompt": ("a text and an answer", _lacks_answer),
    "messages": (f"messages, two or more, the last of the {_ANSWERS}", _lacks_turns),
}
"""By the form of rows, what a row must hold, and what it holds instead (nothing where it is well)."""


def encode(
    rows: Sequence[Row], tokenizer: Any, settings: CausalLM, place: str, key: str = "task.causal_lm"
) -> tuple[Prompted, ...]:
    """The rows put into words and tokenised, prompt and answer apart, as a model that answers would meet them.

    A prompt that leaves no room for its answer loses its beginning, all but a token that begins every text. `key` is
    where the settings stand, for messages.

    Raises:
        DataError: a row lacks an answer, its answer alone is longer than `max_tokens`, or the chat template refuses it.
    """
    require_answers(rows, settings, place)
    limit = min(settings.max_tokens, tokenizer.model_max_length)
    spoken = [_words(row, tokenizer, settings, f"{place}, row {at + 1}", key) for at, row in enumerate(rows)]
    prompts, answers = (_tokens([pair[side] for pair in spoken], tokenizer) for side in (0, 1))
    begin, end = ([], []) if _chats(tokenizer, settings) else _marks(tokenizer)
    found = []
    for at, (row, before, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
        after = [*answer, *end]
        require_room(place, at, "an answer", len(after), limit - 1, f"{key}.max_tokens")
        room = limit - len(after) - len(begin)
        kept = [*begin, *(before[-room:] if room > 0 else [])]
        found.append(Prompted((*kept, *after), len(kept), row.group))
    return tuple(found)


def _words(row: Row, tokenizer: Any, settings: CausalLM, place: str, key: str) -> tuple[str, str]:
    """The prompt, up to where the answer begins, and the answer."""
    *before, last = _turns(row, settings)
    if _chats(tokenizer, settings):
        prompt, whole = _rendered(tokenizer, before, last, place, key)
        # A template that opens the answer otherwise than it tells one says nothing of how an answer ends.
        told = whole.removeprefix(prompt) if whole.startswith(prompt) else _ended(last["content"], tokenizer)
        return prompt, told.rstrip()
    asked = before[0]["content"] if len(before) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in before)
    return settings.template.replace("{text}", asked), last["content"]


def _turns(row: Row, settings: CausalLM) -> list[dict[str, str]]:
    if settings.form == "messages":
        return [{"role": who, "content": text} for who, text in _pairs(row)]
    return [{"role": "user", "content": row.text}, {"role": _ANSWERS, "content": str(row.fields["answer"])}]


def _pairs(row: Row) -> list[tuple[str, str]]:
    return [(turn[0], turn[1]) for turn in row.fields.get("messages", ()) if not isinstance(turn, str)]


def _rendered(tokenizer: Any, before: Turns, last: Mapping[str, str], place: str, key: str) -> tuple[str, str]:
    try:
        return (
            tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True),
            tokenizer.apply_chat_template([*before, last], tokenize=False),
        )
    except Exception as error:  # a template is a program of the model's maker, which raises what it likes
        raise DataError(
            sentence(
                place,
                expected="a conversation that the model's chat template takes",
                found=(str(error).splitlines() or [type(error).__name__])[0],
                remedy=f"correct the row, or set {key}.chat=false",
            )
        ) from error


def _chats(tokenizer: Any, settings: CausalLM) -> bool:
    return settings.chat and bool(getattr(tokenizer, "chat_template", None))


def _ended(text: str, tokenizer: Any) -> str:
    return f"{text}{tokenizer.eos_token or ''}"


def _tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []


def _marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that begin and end every text, where the tokenizer has such."""
    begin, end = ([number] if number is not None else [] for number in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    return begin, end
