"""What a wrong command line or a bad value looks like: one readable line and exit code 1."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

FULL = "HYDRA_FULL_ERROR"


def run(application: Callable[[], object]) -> None:
    """Run a Hydra application; a wrong command line ends it with one line and exit code 1.

    Hydra prints such errors itself, at length, unless it is told to raise them: it is told so until the task begins.

    Args:
        application: What ``hydra.main`` returned; its task is to run inside :func:`task`.
    """
    if os.environ.get(FULL) == "1":
        application()
        return
    with _raising(True):
        try:
            application()
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            stop(error)  # of the command line: task() lets none of its own through


@contextmanager
def task() -> Iterator[None]:
    """Run the part of the application that does the work: bad input is told in one line there, too.

    Errors that are not about input keep their traceback; with ``HYDRA_FULL_ERROR=1`` all do.
    """
    if not _told_to_raise:
        yield
        return
    with _raising(False):
        try:
            yield
        except Exception as error:
            if _is_about_input(error):
                stop(error)
            raise


_told_to_raise = False


@contextmanager
def _raising(wanted: bool) -> Iterator[None]:
    """Set the variable that Hydra looks at, only as long as needed: processes that are started inherit it."""
    global _told_to_raise
    before = os.environ.get(FULL)
    if wanted:
        os.environ[FULL] = "1"
    else:
        os.environ.pop(FULL, None)
    _told_to_raise = True
    try:
        yield
    except Exception:
        os.environ.pop(FULL, None)  # Hydra prints what comes from the task, without its own frames
        raise
    else:
        os.environ.pop(FULL, None)
        if before is not None:
            os.environ[FULL] = before


def stop(error: BaseException) -> NoReturn:
    """Print one line about an error and leave with exit code 1."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    where = "" if rank == "0" else f"rank {rank}: "
    print(f"{where}error: {explain(error)} ({FULL}=1 shows the traceback)", file=sys.stderr, flush=True)
    sys.exit(1)


def explain(error: BaseException) -> str:
    """Return one line that says what is wrong and what there is instead."""
    if isinstance(error, InstantiationException):
        return _about_instantiation(error)
    if isinstance(error, MissingConfigException):
        return _about_group(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value yet: give it one with {error.full_key}=..."
    if "Config group override must be a string or a list" in str(error):
        return "null chooses nothing from a group; every group that may be empty has the option none, e.g. mask=none."
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        if isinstance(cause.parent_node, Container) and "not in struct" in str(cause):
            return _about_key(cause)
        return f"{_one_line(error)} ({_one_line(cause)})"
    if isinstance(error, InterpolationKeyError):
        return f"{error.full_key}: {_one_line(error).split(' full_key:')[0]}"
    return _one_line(error)


def check_complete(cfg: DictConfig) -> None:
    """Refuse a config in which a value that has no default was not given.

    Raises:
        ValueError: With the first such key.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} has no value yet: give it one with {missing[0]}=...")


def _is_about_input(error: BaseException) -> bool:
    if isinstance(error, InstantiationException):
        return error.__cause__ is None or isinstance(error.__cause__, TypeError) or _is_about_input(error.__cause__)
    if isinstance(error, TypeError):
        return "unexpected keyword argument" in str(error)  # a key that was added with + and that nobody takes
    known = (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException)
    return isinstance(error, known) or type(error).__name__ == "MisconfigurationException"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _about_instantiation(error: InstantiationException) -> str:
    key = re.search(r"full_key: (\S+)", str(error))
    cause: BaseException | None = error.__cause__
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    text = _one_line(error).split(" full_key:")[0] if cause is None else explain(cause)
    return f"{key.group(1)}: {text}" if key else text


def _about_group(error: MissingConfigException) -> str:
    missing = error.missing_cfg_file or ""
    group, _, name = missing.rpartition("/")
    options = sorted(error.options or [])
    if not group or not options:
        return _one_line(error).split(" Config search path:")[0]
    return f"{group} has no option {name!r}{_nearest(name, options)}; there are {', '.join(options)}."


def _about_key(error: OmegaConfBaseException) -> str:
    parent = error.parent_node
    assert isinstance(parent, Container)
    prefix = parent._get_full_key(None)
    key = str(error.key)
    siblings = [f"{prefix}.{k}" if prefix else str(k) for k in parent] if isinstance(parent, DictConfig) else []
    wanted = f"{prefix}.{key}" if prefix else key
    near = difflib.get_close_matches(wanted, siblings, n=3, cutoff=0.7)
    elsewhere = [k for k in _keys(parent._get_root()) if k.rpartition(".")[2] == key and k not in near]
    if near or elsewhere:
        return (
            f"There is no key {wanted!r}; nearest: {', '.join(near + elsewhere[:3])}. To add a new one: +{wanted}=..."
        )
    there = ", ".join(k.rpartition(".")[2] for k in siblings) or "no keys"
    return f"There is no key {wanted!r}; {prefix or 'the config'} has {there}. To add a new one: +{wanted}=..."


def _nearest(name: str, options: list[str]) -> str:
    near = difflib.get_close_matches(name, options, n=2)
    return f" (nearest: {', '.join(near)})" if near else ""


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values below a node."""
    children: list[tuple[str, Any]] = []
    if isinstance(node, Container) and not node._is_none() and not node._is_missing():
        if isinstance(node, DictConfig):
            children = [(str(key), node._get_node(key)) for key in node]
        elif isinstance(node, ListConfig):
            children = [(str(index), node._get_node(index)) for index in range(len(node))]
    for key, child in children:
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(child, Container):
            yield from _keys(child, name)
        else:
            yield name
