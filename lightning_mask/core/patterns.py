"""Patterns: from what a user writes ("classifier", "*.bias", "layers:-2:") to names of parameters."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

Patterns = str | Sequence[str] | None
LAYERS = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D"}
"""Classes of linear and convolution layers; the last is transformers' Linear with a weight of shape (in, out)."""


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Return ``patterns`` as a tuple of strings; ``None`` gives an empty one.

    Raises:
        ValueError: If an item is not a non-empty string.
    """
    if patterns is None:
        return ()
    items = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for item in items:
        if not isinstance(item, str) or not item.strip("! "):
            raise ValueError(f"A pattern must be a non-empty string, got {item!r} in {patterns!r}.")
    return items


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map each parameter's first name to all names it answers to (more than one when it is tied), in model order."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return {name: tuple(every) for name, every in names.items()}


def repeated_blocks(model: nn.Module) -> list[str]:
    """Return the names of the model's repeated blocks, from the input to the output.

    Blocks are the children of a container (``ModuleList``, ``Sequential``) that holds two or more modules of one class;
    containers inside a block do not count. Of several classes, the one with the most parameters wins, and all its
    containers are taken in the model's order (the stages of a residual network, say).
    """
    found: dict[type, list[tuple[str, int]]] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        children = list(module.named_children())
        kinds = {type(child) for _, child in children}
        blocks = isinstance(module, nn.ModuleList | nn.Sequential) and len(children) > 1 and len(kinds) == 1
        sizes = [sum(p.numel() for p in child.parameters()) for _, child in children]
        if blocks and all(sizes) and all(len(list(child.children())) for _, child in children):
            kind = kinds.pop()
            found.setdefault(kind, []).extend((f"{prefix}{n}", s) for (n, _), s in zip(children, sizes, strict=True))
            return
        for name, child in children:
            visit(child, f"{prefix}{name}.")

    visit(model, "")
    if not found:
        return []
    best = max(found.values(), key=lambda blocks: sum(size for _, size in blocks))
    return [name for name, _ in best]


def resolve(patterns: Patterns, model: nn.Module, argument: str = "patterns") -> list[str]:
    """Return the first names of the parameters of ``model`` that ``patterns`` name, in the model's order.

    Patterns are read from left to right. One is a glob over parameter names or over module names (a module means every
    parameter below it), ``re:<regex>`` (searched for in parameter names), ``type:<class>`` (modules of that class or of
    a subclass), ``weights:<class>`` (the weights of such modules, without biases; ``weights:`` alone: of all linear and
    convolution layers), ``layers:<slice>`` (of :func:`repeated_blocks`, e.g. ``layers:-2:`` or ``layers:3``), or ``!`` and any
    of these, which takes away; a list that begins with ``!`` begins from everything.

    Args:
        patterns: One pattern or several.
        model: The module whose parameters are meant.
        argument: What the caller calls the patterns; named in errors.

    Raises:
        ValueError: If a pattern matches nothing; the nearest names are in the message.
    """
    names = aliases(model)
    chosen: set[str] = set()
    for position, pattern in enumerate(as_patterns(patterns)):
        negative, bare = pattern.startswith("!"), pattern.removeprefix("!")
        if negative and position == 0:
            chosen = set(names)
        hits = _match(bare, model, names)
        if not hits:
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no parameter. {_nearest(bare, model, names)}"
            )
        chosen = chosen - hits if negative else chosen | hits
    return [name for name in names if name in chosen]


def _below(modules: Iterable[str], names: dict[str, tuple[str, ...]]) -> set[str]:
    prefixes = tuple(f"{module}." if module else "" for module in modules)
    return {name for name, every in names.items() if prefixes and any(n.startswith(prefixes) for n in every)}


def _match(pattern: str, model: nn.Module, names: dict[str, tuple[str, ...]]) -> set[str]:
    kind, rest = _kind(pattern)
    if kind == "re":
        try:
            regex = re.compile(rest)
        except re.error as error:
            raise ValueError(f"The pattern {pattern!r} is not a valid regular expression: {error}.") from None
        return {name for name, every in names.items() if any(regex.search(n) for n in every)}
    modules = dict(model.named_modules(remove_duplicate=False))
    if kind == "type":
        return _below((n for n, m in modules.items() if rest in _classes(m)), names)
    if kind == "weights":
        classes = {rest} if rest else LAYERS
        wanted = {f"{n}.weight" if n else "weight" for n, m in modules.items() if classes & _classes(m)}
        return {name for name, every in names.items() if wanted.intersection(every)}
    if kind == "layers":
        return _below(_slice(rest, pattern, repeated_blocks(model)), names)
    direct = {name for name, every in names.items() if any(fnmatchcase(n, pattern) for n in every)}
    return direct | _below((n for n in modules if n and fnmatchcase(n, pattern)), names)


def _kind(pattern: str) -> tuple[str, str]:
    """What stands before the first colon and after it; a pattern without one is of no kind, also where it reads `layers`."""
    kind, colon, rest = pattern.partition(":")
    return (kind, rest) if colon else ("", pattern)


def _classes(module: nn.Module) -> set[str]:
    return {c.__name__ for c in type(module).__mro__}


def _slice(text: str, pattern: str, blocks: list[str]) -> list[str]:
    parts = text.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
        if len(parts) == 1:
            return [] if numbers[0] is None else [blocks[numbers[0]]]
        return blocks[slice(*numbers)]
    except (ValueError, TypeError):
        raise ValueError(
            f"The pattern {pattern!r} must be 'layers:' and a slice or a number, e.g. 'layers:-2:'."
        ) from None
    except IndexError:
        return []


def _nearest(pattern: str, model: nn.Module, names: dict[str, tuple[str, ...]]) -> str:
    kind, rest = _kind(pattern)
    if kind == "layers":
        blocks = repeated_blocks(model)
        return f"The model has {len(blocks)} repeated blocks" + (f" ({blocks[0]} to {blocks[-1]})." if blocks else ".")
    if kind in ("type", "weights"):
        known = sorted({type(m).__name__ for m in model.modules() if next(m.parameters(), None) is not None})
        close = get_close_matches(rest, known, n=5, cutoff=0.5) or known[:8]
        return f"Module classes with parameters, the nearest first: {', '.join(close)}."
    known = [n for every in names.values() for n in every]
    known += [n for n, m in model.named_modules() if n and next(m.parameters(), None) is not None]
    bare = pattern.strip("*.")
    close = get_close_matches(pattern, known, n=5, cutoff=0.4)
    close = close or [n for n in known if bare and bare.lower() in n.lower()][:5]
    close = close or get_close_matches(bare, known, n=5, cutoff=0.2) or known[:5]
    return f"The nearest names: {', '.join(close)}."
