from __future__ import annotations

from simulations.tasks.punctuation import tagged


def test_marks_become_tags_of_the_words_before_them() -> None:
    found = tagged("Well, it's a film - is it? Yes! No... 3.5 of T-shirts.")
    assert list(zip(found["words"], found["tags"], strict=True)) == [
        ("well", "B-COMMA"),
        ("it's", "O"),
        ("a", "O"),
        ("film", "O"),
        ("is", "O"),
        ("it", "B-QUESTION"),
        ("yes", "B-EXCLAMATION"),
        ("no", "B-STOP"),
        ("3", "B-STOP"),
        ("5", "O"),
        ("of", "O"),
        ("t-shirts", "B-STOP"),
    ]
    assert tagged("…") == {"words": [], "tags": []}
