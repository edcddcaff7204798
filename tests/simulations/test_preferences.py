from __future__ import annotations

from simulations.tasks.preferences import in_disorder, pairs

ROWS = [
    {"text": "What is up?", "answer": "Not very much at all.", "group": "talk"},
    {"text": "what is  up?", "answer": "Everything that is above us.", "group": "talk"},
    {"text": "Who are you?", "answer": "A bot.", "group": "talk"},
]


def test_an_answer_is_preferred_to_its_own_words_in_disorder() -> None:
    (one,) = in_disorder(ROWS, 7)
    assert (one["text"], one["chosen"], one["group"]) == ("What is up?", "Not very much at all.", "talk")
    assert one["rejected"] != one["chosen"]
    assert sorted(one["rejected"].split()) == sorted(one["chosen"].split())
    assert list(in_disorder(ROWS, 7)) == [one]


def test_an_answer_is_preferred_to_one_that_its_question_never_has() -> None:
    made = {row["text"]: row["rejected"] for row in pairs(ROWS, 7)}
    assert made["What is up?"] == "A bot."
    assert made["Who are you?"] in {"Not very much at all.", "Everything that is above us."}
