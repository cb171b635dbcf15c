"""Finds passes that installed distributions register under the entry point group ``ti_fx.passes``.

A distribution's ``pyproject.toml`` says, with the pass's own name on the left:

    [project.entry-points."ti_fx.passes"]
    round-weights = "my_package.passes:RoundWeights"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ti_fx.errors import RecipeError

GROUP = "ti_fx.passes"


class WithRegistered(Mapping[str, type[Any]]):
    """Classes by name: those given, and those that distributions register, each imported when it is asked for.

    Args:
        own: the classes that are imported already.
        base: the class that a registered one must be a subclass of.
    """

    def __init__(self, own: Mapping[str, type[Any]], base: type[Any]) -> None:
        self.own, self.base = own, base

    def __getitem__(self, name: str) -> type[Any]:
        """Return the class of that name.

        Raises:
            KeyError: there is none.
            RecipeError: the entry point of that name can't be imported or is something else, or one takes a name that
                another class has.
        """
        return self.own[name] if name in self.own else self._load(self._entries()[name])

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self.own, *self._entries()])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _entries(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=GROUP):
            own = self.own.get(entry.name)
            if own is not None and own.__module__.partition(".")[0] == __name__.partition(".")[0]:
                raise RecipeError(
                    f"{where(entry)} takes the name of a pass of ti_fx; give it another, or uninstall it"
                )
            if found.setdefault(entry.name, entry) != entry:
                raise RecipeError(f"{where(entry)} and {where(found[entry.name])}: uninstall one")
        return found

    def _load(self, entry: EntryPoint) -> type[Any]:
        try:
            kind: type[Any] = entry.load()
        except Exception as error:  # importing runs whatever the distribution holds
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RecipeError(f"{where(entry)} can't be imported ({reason}); mend or uninstall it") from error
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            raise RecipeError(
                f"{where(entry)} is {entry.value}, no subclass of {self.base.__name__}; mend it"
            )
        found: Any = kind
        if found.name() != entry.name:
            raise RecipeError(
                f"{where(entry)} is a pass that is called {found.name()!r}; register it by that name"
            )
        return found  # type: ignore[no-any-return]


def where(entry: EntryPoint) -> str:
    """Say which entry point of which distribution: ``entry point 'round-weights' of distribution mine 1.0``."""
    origin = (
        "an unknown distribution"
        if entry.dist is None
        else f"distribution {entry.dist.name} {entry.dist.version}"
    )
    return f"entry point {entry.name!r} of {origin}"
