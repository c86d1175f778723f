"""What the runs of one process have in common, made once and kept."""

from collections.abc import Callable
from typing import Any


class Kept:
    """Results of functions by all of their arguments, compared by value, so that what a run is
    given was made of nothing but what it asks for.

    A result lives as long as this object, and none may be changed by who gets it.
    """

    def __init__(self):
        """Holds nothing yet."""
        self._all: dict[tuple, Any] = {}
        self._last: dict[Callable, tuple[tuple, Any]] = {}

    def all(self, make: Callable, *arguments: Any) -> Any:
        """make(*arguments), made once for each choice of arguments: for what is small."""
        key = (make, arguments)
        if key not in self._all:
            self._all[key] = make(*arguments)
        return self._all[key]

    def last(self, make: Callable, *arguments: Any, **settings: Any) -> Any:
        """make(*arguments, **settings), made again where they are not those of the last call: of
        what is large, one is in memory.
        """
        asked = (arguments, settings)
        if make in self._last and self._last[make][0] == asked:
            return self._last[make][1]
        # the old one goes first
        self._last.pop(make, None)
        self._last[make] = (asked, make(*arguments, **settings))
        return self._last[make][1]
