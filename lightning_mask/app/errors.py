"""What a wrong command line or a bad value looks like: one readable line and exit code 2."""

import difflib
import dis
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import Container, DictConfig
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from lightning_mask.app.checks import values
from lightning_mask.app.ranks import keep_failure

FULL = "HYDRA_FULL_ERROR"


def run(application: Callable[[], object]) -> None:
    """Run a Hydra application; a wrong command line ends it with one line and exit code 2.

    Hydra prints such errors itself, at length, unless it is told to raise them: it is told so until the task begins.

    Args:
        application: What ``hydra.main`` returned; its task is to run inside :func:`task`.
    """
    if os.environ.get(FULL) == "1":
        application()
        return
    global _told_to_raise
    before, os.environ[FULL], _told_to_raise = os.environ.get(FULL), "1", True
    try:
        application()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        stop(error)  # of the command line: task() lets none of its own through
    except OSError as error:
        stop(error, "The run's folder cannot be made; another: paths.log_dir=... or hydra.run.dir=...")
    finally:
        _told_to_raise = False
        _set(before)


@contextmanager
def task() -> Iterator[None]:
    """Run the part of the application that does the work: bad input is told in one line there, too.

    Errors that are not about input keep their traceback, without Hydra's frames; with ``HYDRA_FULL_ERROR=1`` all errors do.
    In a sweep every error ends the sweep: Hydra would go on to the next job.
    """
    readable = _told_to_raise
    if readable:
        _set(None)  # processes that are started inherit it
    try:
        yield
    except Exception as error:
        keep_failure(error, is_about_input(error))
        if readable and is_about_input(error):
            stop(error)
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            traceback.print_exc()
            sys.exit(1)
        raise
    if readable:
        _set("1")  # the sweep goes on


_told_to_raise = False


def _set(value: str | None) -> None:
    if value is None:
        os.environ.pop(FULL, None)
    else:
        os.environ[FULL] = value


def stop(error: BaseException, way_out: str = "") -> NoReturn:
    """Print one line about an error and leave: with exit code 2, but 1 where it showed only while the program was at work.

    Other ranks than the first wait a little: where the first has the same to say, it ends them meanwhile.
    """
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    where = "" if rank == "0" else f"rank {rank}: "
    if where:
        time.sleep(3)
    print(
        f"{where}error: {' '.join([explain(error), way_out]).strip()} ({FULL}=1 shows the traceback)",
        file=sys.stderr,
        flush=True,
    )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    sys.exit(1 if full or isinstance(error, RuntimeError) else 2)


def explain(error: BaseException) -> str:
    """Return one line that says what is wrong and what there is instead."""
    if isinstance(error, InstantiationException):
        return _about_instantiation(error)
    if isinstance(error, MissingConfigException):
        return _about_group(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value yet: give it one with {error.full_key}=..."
    if isinstance(error, OverrideParseException) and "=" in error.override:
        return _about_override(error.override)
    if "resolving interpolation '${mask}'" in str(error):  # of a list; what goes with a mask has its name
        return (
            "mask takes one strategy; a second one is a callback: mask=fisher +mask@callbacks.second=prune_magnitude."
        )
    if "Config group override must be a string or a list" in str(error):
        return "null chooses nothing from a group; every group that may be empty has the option none, e.g. mask=none."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        if isinstance(cause.parent_node, Container) and "not in struct" in str(cause):
            return _about_key(cause)
        return f"{_one_line(error)} ({_one_line(cause)})"
    if isinstance(error, InterpolationKeyError):
        return f"{error.full_key}: {_one_line(error).split(' full_key:')[0]}"
    return _one_line(error)


def is_about_input(error: BaseException) -> bool:
    """Whether an error is told in one line, as what a user can mend in the command line, the configs or the data."""
    if isinstance(error, InstantiationException):
        return error.__cause__ is None or isinstance(error.__cause__, TypeError) or is_about_input(error.__cause__)
    if isinstance(error, RuntimeError):
        return _raised_here(error)
    if isinstance(error, TypeError):
        return "unexpected keyword argument" in str(error)  # a key that was added with + and that nobody takes
    known = (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException)
    return isinstance(error, known) or type(error).__name__ == "MisconfigurationException"


def _raised_here(error: BaseException) -> bool:
    """Whether a statement of this package raised an error, in its own words; not torch, at work for it."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or not str(place.tb_frame.f_globals.get("__name__")).startswith("lightning_mask."):
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


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


def _about_override(override: str) -> str:
    key, _, value = override.partition("=")
    if key != key.rstrip():
        return f"{override!r} cannot be read: no spaces around the sign, {key.strip()}={value.strip()}."
    quote = "'" if '"' in value else '"'
    shell = '"' if quote == "'" else "'"
    return (
        f"{override!r} cannot be read: a value with spaces, commas, parentheses or '=' needs quotes, and the shell others "
        f"around them, {shell}{key}={quote}{value.strip(quote)}{quote}{shell}."
    )


def _about_key(error: OmegaConfBaseException) -> str:
    parent = error.parent_node
    assert isinstance(parent, Container)
    prefix: str = parent._get_full_key(None)
    key = str(error.key)
    siblings = [f"{prefix}.{k}" if prefix else k for k in map(str, parent)] if isinstance(parent, DictConfig) else []
    wanted = f"{prefix}.{key}" if prefix else key
    near = difflib.get_close_matches(wanted, siblings, n=3, cutoff=0.7)
    elsewhere = [k for k, _ in values(parent._get_root()) if k.rpartition(".")[2] == key and k not in near]
    if near or elsewhere:
        return (
            f"There is no key {wanted!r}; nearest: {', '.join(near + elsewhere[:3])}. To add a new one: +{wanted}=..."
        )
    there = ", ".join(k.rpartition(".")[2] for k in siblings) or "no keys"
    return f"There is no key {wanted!r}; {prefix or 'the config'} has {there}. To add a new one: +{wanted}=..."


def _nearest(name: str, options: list[str]) -> str:
    near = difflib.get_close_matches(name, options, n=2)
    return f" (nearest: {', '.join(near)})" if near else ""
