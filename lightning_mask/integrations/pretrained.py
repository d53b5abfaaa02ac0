"""Folders that ``from_pretrained`` of transformers loads, without this package."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_mask.core.files import PathLike, whole_folder


def check_pretrained(net: nn.Module, folder: PathLike) -> None:
    """Refuse what has no such folder, and to replace a folder of something else.

    Raises:
        ValueError: If ``net`` is no model of transformers, or ``folder`` holds something else than such a model.
    """
    if not callable(getattr(net, "save_pretrained", None)):
        raise ValueError(
            f"{type(net).__name__} is no model of transformers, so it has no folder for from_pretrained; choose format=dense."
        )
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").is_file())):
        raise ValueError(f"{str(folder)!r} is there and holds something else: give another folder.")


def save_pretrained(net: Any, folder: PathLike, tokenizer: Any = None) -> nn.Module:
    """Write a model of transformers to ``folder``, and check it by loading: weights, configuration, tokenizer.

    Args:
        net: A ``PreTrainedModel`` in whole weights (one that was loaded from fewer bits and widened is written as it is now).
        folder: Made anew; one of such a model is replaced.
        tokenizer: Written beside it; None: no tokenizer.

    Returns:
        The model that was loaded back, in eval mode.

    Raises:
        ValueError: As :func:`check_pretrained`.
        RuntimeError: If what was written does not load equal.
    """
    check_pretrained(net, folder)
    with whole_folder(folder) as temporary:
        net.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        back, info = type(net).from_pretrained(temporary, output_loading_info=True, dtype=net.dtype)
        there, here = back.state_dict(), net.state_dict()
        wrong = next(
            (n for n in here if n not in there or not torch.equal(there[n], here[n].to(there[n].device))), None
        )
        wrong = wrong or next(iter(sorted(info["missing_keys"])), None)
        if wrong is not None:
            raise RuntimeError(f"{folder}: {wrong} did not load equal to what was written.")
    loaded: nn.Module = back.eval()
    return loaded
