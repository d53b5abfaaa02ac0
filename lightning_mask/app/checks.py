"""What a config is refused for before anything is made of it."""

import re
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import Container, DictConfig, ListConfig
from torch import Tensor

_CALLED = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}


def check_complete(cfg: DictConfig) -> None:
    """Refuse a config in which a value that has no default was not given.

    Raises:
        ValueError: With the first such key.
    """
    for key, node in values(cfg):
        if node._is_missing():
            raise ValueError(f"{key} has no value yet: give it one with {key}=...")


def check_types(cfg: DictConfig) -> None:
    """Refuse what is no number, or not whole, where an argument's annotation says so; likewise for true and false.

    Null is left to the target: the application fills some of them in.

    Raises:
        ValueError: With the first such key.
    """
    for key, block in _blocks(cfg):
        try:
            target = get_object(block._target_)
            hints = get_type_hints(getattr(target, "__init__") if isinstance(target, type) else target)  # noqa: B009
        except Exception:  # an import or an annotation that fails: instantiating says more
            continue
        for name, hint in hints.items():
            value = block.get(name)
            wanted = _kinds(hint)
            if wanted and isinstance(value, bool | int | float | str) and not _fits(value, wanted):
                named = [kind for kind in wanted if kind is not int or float not in wanted]
                raise ValueError(f"{key}.{name}={value!r} must be {' or '.join(map(_called, named))}.")


def check_used(cfg: DictConfig, overrides: Iterable[str], names: Iterable[str] = ("lr", "last_layers")) -> None:
    """Refuse a value of the root that was given on the command line and that no part of the config asks for.

    Args:
        cfg: The composed config.
        overrides: Words of the command line.
        names: Keys of the root that are there for other parts to ask for.

    Raises:
        ValueError: With the first such word.
    """
    for override in overrides:
        name = override.lstrip("+").partition("=")[0]
        if name in names and not any(
            re.search(rf"\$\{{(oc\.select:)?{name}\b", str(n._value())) for _, n in values(cfg)
        ):
            raise ValueError(f"{override} changes nothing: no part of the config that was chosen uses {name}.")


def values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names of all values below a node, and their nodes, without resolving any."""
    for name, child in _children(node, prefix):
        if isinstance(child, Container):
            yield from values(child, name)
        else:
            yield name, child


def _blocks(node: Any, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield the dotted names of all blocks below a node that make something."""
    for name, child in _children(node, prefix):
        if isinstance(child, DictConfig) and "_target_" in child and child._target_ is not None:
            yield name, child
        yield from _blocks(child, name)


def _children(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    children: list[tuple[str, Any]] = []
    if isinstance(node, Container) and not node._is_none() and not node._is_missing() and not node._is_interpolation():
        if isinstance(node, DictConfig):
            children = [(str(key), node._get_node(key)) for key in node]
        elif isinstance(node, ListConfig):
            children = [(str(index), node._get_node(index)) for index in range(len(node))]
    for key, child in children:
        yield f"{prefix}.{key}" if prefix else key, child


def _kinds(hint: Any) -> list[Any]:
    """The plain kinds and literal values that an annotation allows; none when it may allow anything else that yaml can say."""
    kinds: list[Any] = []
    for member in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(member) is Literal:
            kinds += [("literal", value) for value in get_args(member)]
        elif member in _CALLED:
            kinds.append(member)
        elif member is not Tensor and get_origin(member) not in (list, dict, tuple):
            return []
    return kinds


def _fits(value: Any, wanted: list[Any]) -> bool:
    for kind in wanted:
        if isinstance(kind, tuple):
            if kind[1] == value:
                return True
        elif type(value) is kind or (kind is float and type(value) is int):
            return True
    return False


def _called(kind: Any) -> str:
    return repr(kind[1]) if isinstance(kind, tuple) else _CALLED[kind]
