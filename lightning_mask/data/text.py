"""Texts with labels for a classifier."""

import os
from collections.abc import Callable
from pathlib import Path

from lightning_mask.data.module import Part, SplitData
from lightning_mask.data.pretrained import load_tokenizer
from lightning_mask.data.splits import Texts, TextSplits, choose_texts
from lightning_mask.data.tokens import Pad, Tokens, tokenise


class TextData(SplitData):
    """Labelled texts, tokenised once and kept on disk, padded batch by batch; training resumes in mid-epoch.

    Batches are dicts: ``input_ids``, ``attention_mask`` and, where the model wants it, ``token_type_ids``, each int64
    [batch, length], and ``labels``, int64 [batch].

    Args:
        source: Called without arguments, returns the texts: a partial of a function of :mod:`lightning_mask.data.sources`,
            or of your own.
        tokenizer: Name of the model whose tokenizer is used, as for :class:`~lightning_mask.tasks.TextClassifier`: "minilm", a
            folder, or a name on the Hugging Face hub.
        max_length: Longer texts are cut to so many tokens.
        batch_size: Training batch size of one rank.
        eval_batch_size: Batch size of one rank for validation and test.
        num_workers: Worker processes of each loader.
        seed: Seed of the order of training, of the subset, and of what is held out.
        train_size: Train on so many examples only, classes in proportion; default: all.
        cache_dir: Folder that keeps the tokens; default: ``lightning_mask`` in the user's cache folder.
        group_by_length: Put texts of like length into a batch: of the tweets' batches 3 % is padding then, instead of 42 %.
        hold_out: Share (float) or number (int) of the training examples that are validated on instead of the validation set, and
            not trained on: for choices that must not look at that set; default: none.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        source: Callable[[], TextSplits],
        tokenizer: str = "minilm",
        max_length: int = 64,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        train_size: int | None = None,
        cache_dir: str | None = None,
        group_by_length: bool = True,
        hold_out: float | int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            train_size=train_size,
            hold_out=hold_out,
        )
        if max_length < 3:
            raise ValueError(f"max_length must be at least 3 (two of them are special tokens), got {max_length}.")
        self.source = source
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else _user_cache()
        self.group_by_length = group_by_length
        self._splits: TextSplits | None = None
        self._tokens: dict[str, Tokens] = {}
        self._pad: Pad | None = None

    @property
    def splits(self) -> TextSplits:
        """The texts themselves; reads them when first asked for."""
        if self._splits is None:
            self._splits = choose_texts(self.source(), self.train_size, self.hold_out, seed=self.seed)
        return self._splits

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        return self.splits.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples in the sets "train", "validation" and "test"."""
        return {name: len(getattr(self.splits, name)) for name in ("train", "validation", "test")}

    def prepare_data(self) -> None:
        """Tokenise everything, so that one process does so and the others find it in the cache."""
        for name in ("train", "validation", "test"):
            self.tokens(name)

    def tokens(self, name: str) -> Tokens:
        """Return the tokens of the split "train", "validation" or "test".

        Raises:
            FileNotFoundError: If the tokenizer cannot be found.
        """
        if name not in self._tokens:
            tokenizer = load_tokenizer(self.tokenizer)
            self._pad = Pad(tokenizer.pad_token_id, tokenizer.padding_side)
            if self.num_workers:
                os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # the workers, forked later, do not tokenise
            for each in ("train", "validation", "test"):
                part: Texts = getattr(self.splits, each)
                self._tokens[each] = tokenise(part.texts, part.labels, tokenizer, self.max_length, self.cache_dir)
        return self._tokens[name]

    def _part(self, name: str) -> Part:
        tokens = self.tokens(name)
        assert self._pad is not None
        return Part(tokens, self._pad, tokens.lengths if self.group_by_length else None)


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lightning_mask"
