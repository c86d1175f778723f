"""What is made once, and what is made again."""

import weakref

from dpo_jax import kept


class Maker:
    """A function that notes what it was asked for."""

    def __init__(self):
        self.asked: list[tuple] = []

    def __call__(self, *arguments: int, sign: int = 1) -> list[int]:
        self.asked.append(arguments)
        return [sign * one for one in arguments]


def test_all_results_are_kept_by_function_and_arguments():
    keeper, make, other = kept.Kept(), Maker(), Maker()
    first, second = keeper.all(make, 1, 2), keeper.all(make, 2, 1)
    assert keeper.all(make, 1, 2) is first and keeper.all(make, 2, 1) is second
    assert keeper.all(other, 1, 2) == first and keeper.all(other, 1, 2) is not first
    assert (make.asked, other.asked) == ([(1, 2), (2, 1)], [(1, 2)])


def test_of_large_results_the_last_is_kept_for_each_function():
    keeper, make, other = kept.Kept(), Maker(), Maker()
    assert keeper.last(make, 1) is keeper.last(make, 1)
    assert keeper.last(other, 3) is keeper.last(other, 3)
    assert keeper.last(make, 1, sign=-1) == [-1]
    assert keeper.last(make, 1) == [1]
    assert (make.asked, other.asked) == ([(1,), (1,), (1,)], [(3,)])


def test_a_large_result_is_gone_before_the_next_one_of_its_function_is_made():
    class Large:
        pass

    made, there = [], []

    def make(number: int) -> Large:
        there.append([one() is not None for one in made])
        large = Large()
        made.append(weakref.ref(large))
        return large

    keeper = kept.Kept()
    for number in range(3):
        keeper.last(make, number)
    assert there == [[], [False], [False, False]]


def test_what_could_not_be_made_is_asked_for_again():
    def make(broken: list[int]) -> int:
        return broken.pop()

    keeper, numbers = kept.Kept(), []
    for later in ([], [7]):
        numbers += later
        try:
            found = keeper.last(make, numbers)
        except IndexError:
            found = None
    assert found == 7
