"""Texts as tokens: made once, kept on disk, padded batch by batch."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_mask.core.files import whole_file

Example = tuple[dict[str, Tensor], int]


class Tokens(Dataset[Example]):
    """Tokenised texts, stored end to end.

    Args:
        columns: What the tokenizer made ("input_ids", for some models "token_type_ids"), each one int32 tensor [total].
        ends: Where each text ends in them, int64 [n].
        labels: Class indices, int64 [n].
    """

    def __init__(self, columns: dict[str, Tensor], ends: Tensor, labels: Tensor) -> None:
        self.columns = columns
        self.ends = ends
        self.labels = labels

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Example:
        start = int(self.ends[index - 1]) if index else 0
        end = int(self.ends[index])
        return {name: column[start:end] for name, column in self.columns.items()}, int(self.labels[index])

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each text, int64 [n]."""
        return torch.diff(self.ends, prepend=torch.zeros(1, dtype=self.ends.dtype))


class Pad:
    """Makes a batch of tokenised texts, as long as the longest of them.

    Args:
        pad_id: Token that fills the rows up.
        side: "right" or "left": where the filling goes.
    """

    def __init__(self, pad_id: int, side: str = "right") -> None:
        self.pad_id = pad_id
        self.side = side

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """Return ``attention_mask`` and the tokens' columns, each int64 [batch, length], and ``labels``, int64 [batch]."""
        longest = max(len(columns["input_ids"]) for columns, _ in examples)
        batch: dict[str, Tensor] = {}
        for name in examples[0][0]:
            fill = self.pad_id if name == "input_ids" else 0
            batch[name] = torch.full((len(examples), longest), fill, dtype=torch.int64)
        batch["attention_mask"] = torch.zeros(len(examples), longest, dtype=torch.int64)
        for row, (columns, _) in enumerate(examples):
            length = len(columns["input_ids"])
            place = slice(longest - length, longest) if self.side == "left" else slice(0, length)
            for name, column in columns.items():
                batch[name][row, place] = column.long()
            batch["attention_mask"][row, place] = 1
        batch["labels"] = torch.tensor([label for _, label in examples])
        return batch


def tokenise(
    texts: Sequence[str], labels: Sequence[int], tokenizer: Any, max_length: int, cache_dir: Path | None
) -> Tokens:
    """Return the texts as tokens, from the cache where they are there, and put there where they are not.

    The file's name is a hash of the texts, the tokenizer and ``max_length``, so that a file never is out of date. It is
    written under another name first, then renamed; several processes may do so at once. A damaged file is made anew,
    with a warning; a cache that cannot be written only costs the time, with a warning too.

    Args:
        texts: The texts.
        labels: Class index of each.
        tokenizer: A Hugging Face tokenizer.
        max_length: Longer texts are cut to so many tokens, the special ones included.
        cache_dir: Folder of the cache; None: no cache.
    """
    target = torch.tensor(labels, dtype=torch.int64)
    path = None if cache_dir is None else cache_dir / f"{_key(texts, tokenizer, max_length)}.safetensors"
    stored = None if path is None else _read(path, len(texts))
    if stored is None:
        stored = _encode(texts, tokenizer, max_length)
        if path is not None:
            _write(path, stored)
    ends = stored.pop("ends")
    if "token_type_ids" in tokenizer.model_input_names and "token_type_ids" not in stored:
        stored["token_type_ids"] = torch.zeros_like(stored["input_ids"])
    return Tokens(stored, ends, target)


def _encode(texts: Sequence[str], tokenizer: Any, max_length: int) -> dict[str, Tensor]:
    ids: list[int] = []
    types: list[int] = []
    ends = []
    for first in range(0, len(texts), 10_000):
        encoded = tokenizer(list(texts[first : first + 10_000]), truncation=True, max_length=max_length, padding=False)
        for row in encoded["input_ids"]:
            ids += row
            ends.append(len(ids))
        for row in encoded.get("token_type_ids", []):
            types += row
    tensors = {"input_ids": torch.tensor(ids, dtype=torch.int32), "ends": torch.tensor(ends, dtype=torch.int64)}
    if any(types):
        tensors["token_type_ids"] = torch.tensor(types, dtype=torch.int32)
    return tensors


def _key(texts: Sequence[str], tokenizer: Any, max_length: int) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        identity = repr(sorted(tokenizer.get_vocab().items()))
    else:
        parts = json.loads(backend.to_str())
        # What the latest call asked for, not what the tokenizer is.
        identity = json.dumps({name: part for name, part in parts.items() if name not in ("truncation", "padding")})
    digest = hashlib.sha256(
        f"{type(tokenizer).__name__}\0{max_length}\0{tokenizer.truncation_side}\0{identity}".encode()
    )
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:40]


def _read(path: Path, size: int) -> dict[str, Tensor] | None:
    from safetensors.torch import load

    try:
        # Read whole, not mapped: another process may replace the file meanwhile.
        tensors = load(path.read_bytes())
        ends = tensors["ends"]
        if len(ends) == size and len(tensors["input_ids"]) == (int(ends[-1]) if size else 0):
            return tensors
        problem = "it does not fit the texts"
    except FileNotFoundError:
        return None
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(f"The cached tokens in {path} cannot be used ({problem}); they are made anew.", stacklevel=4)
    return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(save(tensors))
    except OSError as error:
        warnings.warn(
            f"The tokens could not be kept in {path.parent} ({error}); the next run makes them anew.", stacklevel=4
        )
