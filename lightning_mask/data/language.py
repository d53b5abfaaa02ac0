"""Texts for a language model: to be continued, or to be answered."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_mask.data.module import Part, SplitData
from lightning_mask.data.pretrained import load_tokenizer
from lightning_mask.data.splits import Texts, TextSplits, choose_texts
from lightning_mask.data.tokens import Example, Pad, Tokens

IGNORED = -100  # a label that no loss counts


class LanguageData(SplitData):
    """Texts with the next token as the label; training resumes in mid-epoch.

    Without a prompt, the model learns each text, and its end. With one, it learns to answer: the prompt is read, and only the
    answer (the name of the text's class) and its end are learnt.

    Batches are dicts: ``input_ids`` and ``attention_mask``, int64 [batch, length], and ``labels``, int64 [batch, length]: the
    tokens that are learnt, and -100 for those of the prompt and for padding.

    Args:
        source: Called without arguments, returns the texts: a partial of a function of :mod:`lightning_mask.data.sources`,
            or of your own.
        tokenizer: Name of the model whose tokenizer is used, as for :class:`~lightning_mask.tasks.CausalLM`.
        prompt: What the model is asked, with ``{text}`` in it; None: it learns the texts themselves.
        max_length: Tokens of a row at most: of longer texts the beginning is kept, with the whole of the prompt and the answer.
        batch_size: Training batch size of one rank.
        eval_batch_size: Batch size of one rank for validation and test.
        num_workers: Worker processes of each loader.
        seed: Seed of the order of training, of the subset, and of what is held out.
        train_size: Train on so many examples only, classes in proportion; default: all.
        group_by_length: Put texts of like length into a batch.
        hold_out: Share (float) or number (int) of the training examples that are validated on instead of the validation set, and
            not trained on: for choices that must not look at that set; default: none.

    Raises:
        ValueError: If ``max_length`` is below 3, or ``prompt`` lacks ``{text}`` or leaves no room for the text.
    """

    def __init__(
        self,
        source: Callable[[], TextSplits],
        tokenizer: str = "smollm2",
        prompt: str | None = None,
        max_length: int = 64,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        train_size: int | None = None,
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
            raise ValueError(f"max_length must be at least 3, got {max_length}.")
        if prompt is not None and prompt.count("{text}") != 1:
            raise ValueError(f"prompt must have {{text}} in it, once, got {prompt!r}.")
        self.source = source
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_length = max_length
        self.group_by_length = group_by_length
        self._splits: TextSplits | None = None
        self._tokens: dict[str, Tokens] = {}
        self._collate: PadAndLabel | None = None

    @property
    def splits(self) -> TextSplits:
        """The texts themselves; reads them when first asked for."""
        if self._splits is None:
            self._splits = choose_texts(self.source(), self.train_size, self.hold_out, seed=self.seed)
        return self._splits

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples in the sets "train", "validation" and "test"."""
        return {name: len(getattr(self.splits, name)) for name in ("train", "validation", "test")}

    def tokens(self, name: str) -> Tokens:
        """Return the tokens of the split "train", "validation" or "test"; the label of a row is the length of its prompt.

        Raises:
            FileNotFoundError: If the tokenizer cannot be found.
            ValueError: If the prompt leaves no room for the text.
        """
        if not self._tokens:
            tokenizer = load_tokenizer(self.tokenizer)
            self._collate = PadAndLabel(tokenizer.pad_token_id)
            for each in ("train", "validation", "test"):
                self._tokens[each] = self._encode(getattr(self.splits, each), tokenizer)
        return self._tokens[name]

    def _encode(self, part: Texts, tokenizer: Callable[..., dict[str, list[list[int]]]]) -> Tokens:
        def ids(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

        end = [int(getattr(tokenizer, "eos_token_id"))]  # noqa: B009
        before, _, after = (self.prompt or "{text}").partition("{text}")
        head, tail = ids([before, after]) if self.prompt else ([], [])
        answers = ids(self.splits.class_names) if self.prompt else []
        longest = max(map(len, answers), default=0)
        room = self.max_length - len(head) - len(tail) - longest - len(end)
        if room < 1:
            raise ValueError(
                f"The prompt and its answer have {self.max_length - room} tokens, which leaves none of "
                f"max_length={self.max_length} for the text: raise max_length."
            )
        rows, prompts = [], []
        for text, label in zip(ids(part.texts), part.labels, strict=True):
            prompt = head + text[:room] + tail if self.prompt else []
            rows.append(prompt + (answers[label] if self.prompt else text[:room]) + end)
            prompts.append(len(prompt))
        flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        ends = torch.tensor([len(row) for row in rows], dtype=torch.int64).cumsum(0)
        return Tokens({"input_ids": flat}, ends, torch.tensor(prompts, dtype=torch.int64))

    def _part(self, name: str) -> Part:
        tokens = self.tokens(name)
        assert self._collate is not None
        # In evaluation none, else the first batches, which a limit leaves, would be the longest texts alone.
        grouped = self.group_by_length and name == "train"
        return Part(tokens, self._collate, tokens.lengths if grouped else None)


class PadAndLabel:
    """Makes a batch of token rows, as long as the longest of them, with labels where something is to be learnt.

    Args:
        pad_id: Token that fills the rows up, on the right.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad = Pad(pad_id)

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each int64 [batch, length]."""
        batch = self.pad(examples)
        prompts = batch.pop("labels")
        places = torch.arange(batch["input_ids"].shape[1])
        learnt = batch["attention_mask"].bool() & (places >= prompts[:, None])
        batch["labels"] = torch.where(learnt, batch["input_ids"], IGNORED)
        return batch
