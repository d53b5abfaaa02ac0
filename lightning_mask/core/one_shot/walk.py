"""A network taken one unit at a time, each seen with the inputs that it gets behind the units before it.

A unit is a repeated block of the model, or a layer outside of these (of a network without blocks, every layer). Where a
unit's input is the output of the one before and all its other arguments are those of that one, as in a stack of
transformer layers, the inputs of one unit are kept and become those of the next by running the unit. Elsewhere the model is
run on the batches again, up to the unit: slower, and right however the network is wired.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_mask.core.patterns import repeated_blocks

Forward = Callable[[Any], object]
Args = tuple[tuple[Any, ...], dict[str, Any]]
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Link:
    """How a unit gets its input from the one before: as which of its arguments, and which part of that one's output.

    Attributes:
        argument: Index among the leaves of the arguments.
        part: Index in the output where that is a tuple or a list; None: the output itself.
    """

    argument: int
    part: int | None


@dataclass(frozen=True)
class Unit:
    """A part of the network that is pruned at once.

    Attributes:
        path: Of the module.
        module: The block or layer.
        layers: Paths of the layers in it that were asked for.
        once: Whether every batch runs it exactly once.
        link: To the unit before; None: there is none, or its input comes from elsewhere.
    """

    path: str
    module: nn.Module
    layers: tuple[str, ...]
    once: bool
    link: Link | None = None


class _Stop(BaseException):
    """Ends a run of the model behind the unit that is looked at."""


class Walk:
    """Goes through the units of a model in the order in which they run.

    For each, :meth:`observe` shows what comes into its layers; then the unit may be changed; then :meth:`leave` makes the
    next one's inputs. No gradients are recorded; the model is to be in eval mode.

    Args:
        model: The network.
        forward: Runs the model on a batch.
        batches: The batches; kept, and gone through again for each unit.
        layers: Paths of the layers that are to be seen.

    Attributes:
        units: Those that have any of the layers, in the order in which they first run.
        idle: Paths of the layers that no batch ran.
    """

    def __init__(self, model: nn.Module, forward: Forward, batches: Sequence[Any], layers: Sequence[str]) -> None:
        self._forward, self._batches = forward, batches
        self._inputs: list[Args] | None = None
        modules = dict(model.named_modules(remove_duplicate=False))
        calls = self._calls({path: modules[path] for path in (*repeated_blocks(model), *layers)})
        self.idle = [path for path in layers if not any(calls[path])]
        of_unit: dict[str, list[str]] = {}
        blocks = [path for path in repeated_blocks(model) if any(calls[path])]
        for path in (path for path in layers if any(calls[path])):
            block = next((b for b in blocks if path.startswith(f"{b}.")), path)
            of_unit.setdefault(block, []).append(path)
        order = [path for path in calls if path in of_unit]  # in which they first ran
        found = [Unit(p, modules[p], tuple(of_unit[p]), all(n == 1 for n in calls[p])) for p in order]
        links = self._links(found)
        self.units = [Unit(u.path, u.module, u.layers, u.once, link) for u, link in zip(found, links, strict=True)]

    def observe(self, unit: Unit, see: Mapping[nn.Module, Callable[[Args], None]]) -> None:
        """Run ``unit`` on all batches; each module in ``see`` is shown what it is called with, then the unit is as it was."""
        keep = self._inputs is None and self._next_link(unit) is not None
        kept: list[Args] = []
        with ExitStack() as hooks:
            for module, show in see.items():
                hooks.enter_context(_before(module, show))
            if keep:
                hooks.enter_context(_before(unit.module, kept.append))
            self._run(unit)
        if keep:
            self._inputs = kept

    def leave(self, unit: Unit) -> None:
        """Turn the inputs of ``unit`` into those of the one after it, where these are its outputs; else forget them."""
        link, inputs = self._next_link(unit), self._inputs
        if link is None or inputs is None:
            self._inputs = None
            return
        with torch.no_grad():
            for i, (args, kwargs) in enumerate(inputs):
                output = unit.module(*args, **kwargs)
                leaves, spec = tree_flatten((args, kwargs))
                leaves[link.argument] = output if link.part is None else output[link.part]
                inputs[i] = tree_unflatten(leaves, spec)

    def _next_link(self, unit: Unit) -> Link | None:
        after = self.units.index(unit) + 1
        return self.units[after].link if after < len(self.units) else None

    def _run(self, unit: Unit) -> None:
        with torch.no_grad():
            if self._inputs is not None:
                for args, kwargs in self._inputs:
                    unit.module(*args, **kwargs)
                return
            with _after(unit.module, _stop) if unit.once else ExitStack():
                for batch in self._batches:
                    try:
                        self._forward(batch)
                    except _Stop:
                        continue

    def _calls(self, modules: Mapping[str, nn.Module]) -> dict[str, list[int]]:
        """How often each batch runs each module; the modules in the order in which they first run, then the others."""
        calls: dict[str, list[int]] = {}

        def count(path: str, i: int, args: Args) -> None:
            calls.setdefault(path, [0] * len(self._batches))[i] += 1

        for i, batch in enumerate(self._batches):
            with ExitStack() as hooks, torch.no_grad():
                for path, module in modules.items():
                    hooks.enter_context(_before(module, partial(count, path, i)))
                self._forward(batch)
        return calls | {path: [0] * len(self._batches) for path in modules if path not in calls}

    def _links(self, units: Sequence[Unit]) -> list[Link | None]:
        """How each unit gets its input from the one before, by what happens in the first batch."""
        found: list[Link | None] = [None] * len(units)
        running: dict[int, _Call] = {}

        def begin(i: int, args: Args) -> None:
            call = running[i] = _Call(*tree_flatten(args))
            if i and i - 1 in running and units[i - 1].once:
                found[i] = _link(running.pop(i - 1), call)

        def end(i: int, output: object) -> None:
            running[i].end(output)

        with ExitStack() as hooks, torch.no_grad():
            for i, unit in enumerate(units):
                if unit.once:
                    hooks.enter_context(_before(unit.module, partial(begin, i)))
                    hooks.enter_context(_after(unit.module, partial(end, i)))
            self._forward(self._batches[0])
        return found


class _Call:
    """One run of a unit: its arguments, its output, and at which version of their contents."""

    def __init__(self, leaves: list[Any], spec: TreeSpec) -> None:
        self.leaves, self.spec = leaves, spec
        self.versions = _versions(leaves)
        self.outputs: list[Any] = []
        self.alone = True
        self.output_versions: list[int | None] = []
        self.steady = False

    def end(self, output: object) -> None:
        """Note what came out, and whether the arguments are what they were."""
        self.alone = isinstance(output, Tensor)
        self.outputs = list(output) if isinstance(output, tuple | list) else [output]
        self.output_versions = _versions(self.outputs)
        self.steady = _versions(self.leaves) == self.versions


def _versions(leaves: Sequence[Any]) -> list[int | None]:
    return [leaf._version if isinstance(leaf, Tensor) else None for leaf in leaves]


def _link(before: _Call, call: _Call) -> Link | None:
    """The link where one argument is an output of the call before, unchanged, and all others are that call's own."""
    if not before.steady or before.spec != call.spec:
        return None
    others = [i for i in range(len(call.leaves)) if not _same(before, call, i)]
    if len(others) != 1:
        return None
    given = call.leaves[others[0]]
    for part, output in enumerate(before.outputs):
        if isinstance(given, Tensor) and output is given and given._version == before.output_versions[part]:
            return Link(others[0], None if before.alone else part)
    return None


def _same(before: _Call, call: _Call, i: int) -> bool:
    a, b = before.leaves[i], call.leaves[i]
    if isinstance(a, Tensor):
        return a is b and before.versions[i] == call.versions[i]
    return isinstance(a, _PLAIN) and type(a) is type(b) and a == b


def _stop(_: object) -> None:
    raise _Stop


@contextmanager
def _before(module: nn.Module, show: Callable[[Args], None]) -> Iterator[None]:
    """Show what ``module`` is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        show((args, kwargs))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, show: Callable[[object], None]) -> Iterator[None]:
    """Show what ``module`` returns."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
        show(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
