"""Which tensor of one checkpoint is which of another: the same names, or all of them with a prefix on one side."""

import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from lightning_mask.delta.weights import Weights


class Names:
    """Finds tensors of a checkpoint by the names that a delta, or another checkpoint, has for them.

    The prefix is the one under which most names are found: ``net.encoder.weight`` here may be ``encoder.weight`` there.

    Args:
        names: The names to look for.
        there: The checkpoint.
        aliases: Further names, of tied tensors, to those in ``names``.
    """

    def __init__(self, names: Collection[str], there: Weights, aliases: Mapping[str, str] | None = None) -> None:
        self._names, self._there = names, there
        self._aliases = dict(aliases or {})
        self._known = {*there.specs, *there.aliases}
        votes = Counter((name[:at], "") for name in names for at in _starts(name) if name[at:] in self._known)
        ours = set(names)
        votes.update(("", name[:at]) for name in there.specs for at in _starts(name) if at and name[at:] in ours)
        best = max(votes, key=lambda prefix: (votes[prefix], -len("".join(prefix))), default=("", ""))
        self._strip, self._put = best
        self._shared = _common(names)

    def find(self, name: str) -> str | None:
        """Return the checkpoint's name of a tensor, or None where it has none."""
        tied = [alias for alias, kept in self._aliases.items() if kept == name]
        for mine in (name, *tied):
            for theirs in (
                self._put + mine[len(self._strip) :] if mine.startswith(self._strip) else "",
                self.new(mine),
            ):
                if theirs in self._known:
                    return self._there.aliases.get(theirs, theirs)
        return None

    def new(self, name: str) -> str:
        """Return what a tensor that the checkpoint lacks is to be called there: without the prefix that all names share."""
        return name[len(self._shared) :] if self._strip else self._put + name

    def missing(self, name: str) -> str:
        """Return the name that was looked for, with the nearest that there are."""
        wanted = self._put + name.removeprefix(self._strip)
        near = difflib.get_close_matches(wanted, self._there.specs, n=2)
        return f"{wanted!r} (nearest: {', '.join(near)})" if near else f"{wanted!r}"


def _starts(name: str) -> Iterator[int]:
    """Where a name begins, and where it goes on after a dot."""
    yield 0
    yield from (at + 1 for at, letter in enumerate(name) if letter == ".")


def _common(names: Collection[str]) -> str:
    """The longest run of whole words that all names begin with."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    at = max((at for at in _starts(first) if last.startswith(first[:at])), default=0)
    return first[:at]
