import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.tasks.spans import spans


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("", set()),
        ("O O", set()),
        ("B-a", {(0, 1, "a")}),
        ("B-a I-a O", {(0, 2, "a")}),
        ("O B-a I-a", {(1, 3, "a")}),
        ("B-a B-a", {(0, 1, "a"), (1, 2, "a")}),
        ("B-a I-b", {(0, 1, "a"), (1, 2, "b")}),
        ("I-a I-a O I-a", {(0, 2, "a"), (3, 4, "a")}),
        ("B-a I-a B-a I-a", {(0, 2, "a"), (2, 4, "a")}),
        ("O I-b B-b O", {(1, 2, "b"), (2, 3, "b")}),
        ("B-a-b I-a-b I-a", {(0, 2, "a-b"), (2, 3, "a")}),
    ],
)
def test_spans_by_hand(tags: str, found: set[tuple[int, int, str]]) -> None:
    assert spans(tags.split()) == found


@given(st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"])))
def test_every_tagged_word_is_in_one_span_of_its_kind_and_no_other_word_in_any(tags: list[str]) -> None:
    covered = [at for start, end, _ in spans(tags) for at in range(start, end)]
    assert sorted(covered) == [at for at, tag in enumerate(tags) if tag != "O"]
    assert all(tags[at][2:] == kind for start, end, kind in spans(tags) for at in range(start, end))
    begins = {at for at, tag in enumerate(tags) if tag.startswith("B-")}
    assert begins <= {start for start, _, _ in spans(tags)}
