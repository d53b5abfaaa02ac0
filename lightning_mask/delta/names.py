"""Which tensor of one checkpoint is which of another: the same names, or all of them with a prefix on one side."""

import difflib
from collections import Counter
from collections.abc import Collection, Mapping

from lightning_mask.delta.weights import Weights, common_start, starts


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
        votes = Counter((name[:at], "") for name in names for at in starts(name) if name[at:] in self._known)
        ours = set(names)
        votes.update(("", name[:at]) for name in there.specs for at in starts(name) if at and name[at:] in ours)
        best = max(votes, key=lambda prefix: (votes[prefix], -len("".join(prefix))), default=("", ""))
        self._strip, self._put = best
        self._shared = common_start(names)

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
