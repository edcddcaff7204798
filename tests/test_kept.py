from __future__ import annotations

from fedpeft.kept import kept


def test_the_last_results_are_kept_and_the_one_longest_unused_goes_first() -> None:
    made = []

    @kept(2)
    def square(number: int) -> int:
        made.append(number)
        return number * number

    assert [square(number) for number in (1, 2, 1, 1)] == [1, 4, 1, 1]
    assert made == [1, 2]
    assert square.kept() == [((2,), 4), ((1,), 1)]
    assert [square(number) for number in (3, 1, 2)] == [9, 1, 4]
    assert made == [1, 2, 3, 2]
    square.let_go(1)
    square.let_go(7)
    assert square.kept() == [((2,), 4)]
    square.cache_clear()
    assert square.kept() == []
