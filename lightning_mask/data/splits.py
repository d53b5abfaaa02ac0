"""Training, validation and test sets, and how data without them is split: the same on every machine and in every run."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Texts:
    """Texts and their labels: class indices from 0."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Texts":
        """Return the rows at ``indices``."""
        return Texts([self.texts[i] for i in indices], [self.labels[i] for i in indices])


@dataclass(frozen=True)
class TextSplits:
    """What a source of texts returns: three sets, and the names of the classes in the order of their indices."""

    train: Texts
    validation: Texts
    test: Texts
    class_names: list[str]


def stratified_split(
    labels: Sequence[int], parts: Sequence[float], *, seed: int = 0, keys: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Split examples so that each part has its share of every class, and examples with equal keys stay together.

    The order is that of SHA-256 over seed and key: the same on every machine, whatever its versions, and adding rows
    leaves nearly all others where they were.

    Args:
        labels: Class of each example.
        parts: Shares of all parts but the first, which gets the rest: ``[0.1, 0.1]`` makes 80, 10 and 10 %.
        seed: Another seed, another split.
        keys: One for each example; default: its index. Examples with equal keys never part (give the text here, so
            that no text is both trained on and tested on). Those that alone would make more than a twentieth of a part
            go to the rest, unless the part would be less than half full.

    Returns:
        One ascending list of indices for each part: the rest first, then those of ``parts``.

    Raises:
        ValueError: If a share is negative or all of them leave nothing for the rest.

    Example:
        >>> [len(part) for part in stratified_split([0] * 10 + [1] * 20, [0.1, 0.2])]
        [21, 3, 6]
    """
    if any(part < 0 for part in parts) or sum(parts) >= 1:
        raise ValueError(f"The shares of the splits must be at least 0 and sum to less than 1, got {list(parts)}.")
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in range(len(labels)):
        groups[index if keys is None else keys[index]].append(index)
    by_class: dict[int, list[tuple[bytes, list[int]]]] = defaultdict(list)
    for key, members in groups.items():
        label = Counter(labels[index] for index in members).most_common(1)[0][0]
        digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
        by_class[label].append((digest, members))
    split: list[list[int]] = [[] for _ in range(len(parts) + 1)]
    for label in sorted(by_class):
        waiting = [members for _, members in sorted(by_class[label])]
        size = sum(map(len, waiting))
        for number, part in enumerate(parts, start=1):
            asked = wanted = int(part * size + 0.5)
            most = max(1, asked // 20)  # one text repeated 300 times must not fill a test set: it is trained on
            while True:
                left: list[list[int]] = []
                for members in waiting:
                    if len(members) <= min(wanted, most):
                        split[number] += members
                        wanted -= len(members)
                    else:
                        left.append(members)
                waiting = left
                if wanted <= asked / 2 or most >= asked:
                    break
                most *= 2  # where nearly all texts are repeated, those repeated least
        for members in waiting:
            split[0] += members
    return [sorted(part) for part in split]


def stratified_subset(labels: Sequence[int], size: int, *, seed: int = 0) -> list[int]:
    """Return ``size`` ascending indices with the classes in proportion; a larger subset holds the smaller ones.

    Raises:
        ValueError: If ``size`` is below 1 or above the number of examples.
    """
    if not 1 <= size <= len(labels):
        raise ValueError(
            f"train_size must lie between 1 and the {len(labels)} training examples there are, got {size}."
        )
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    ranked = []
    for label, members in by_class.items():
        order = sorted(members, key=lambda index: hashlib.sha256(f"{seed}\0{index}".encode()).digest())
        # Evenly spread over (0, 1), so that any prefix of the whole has all classes in proportion.
        ranked += [((place + 0.5) / len(order), label, index) for place, index in enumerate(order)]
    return sorted(index for _, _, index in sorted(ranked)[:size])


def hold_out(
    labels: Sequence[int], amount: float | int, *, seed: int = 0, keys: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Split a training set once more: return the indices to train on, and those to validate on instead of a validation set.

    For choices that must not look at the validation set, such as a learning rate. Classes are in proportion.

    Args:
        labels: Class of each training example.
        amount: Share (float) or number (int) of the examples to validate on; a number is met to about a class's rounding.
        seed: Another seed, another split.
        keys: As for :func:`stratified_split`: equal ones stay together.

    Raises:
        ValueError: If that leaves nothing to train on or to validate on.
    """
    share = amount / len(labels) if isinstance(amount, int) else amount
    if 0 < share < 1:
        rest, held = stratified_split(labels, [share], seed=seed, keys=keys)
        if rest and held:
            return [rest, held]
    raise ValueError(
        f"hold_out={amount!r} of {len(labels)} training examples leaves nothing to train on or to validate on: give a share "
        "in (0, 1) as a float, or a number of examples."
    )


def choose_texts(splits: TextSplits, size: int | None, held: float | int | None, *, seed: int = 0) -> TextSplits:
    """Return the sets with ``size`` texts to train on, a part of them (:func:`hold_out`) in place of the validation set.

    Args:
        splits: All texts.
        size: As for :func:`stratified_subset`; None: all of the training set.
        held: As for :func:`hold_out`; None: the validation set stays.
        seed: Seed of both choices.

    Raises:
        ValueError: As the two functions do.
    """
    train, validation = splits.train, splits.validation
    if size is not None:
        train = train.take(stratified_subset(train.labels, size, seed=seed))
    if held is not None:
        keys = [" ".join(text.casefold().split()) for text in train.texts]
        train, validation = map(train.take, hold_out(train.labels, held, seed=seed, keys=keys))
    return TextSplits(train, validation, splits.test, splits.class_names)
