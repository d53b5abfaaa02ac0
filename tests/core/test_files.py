"""Files and folders that appear whole: where they go, who may read them, and when they are on the disk."""

import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_mask.core.files import whole_file, whole_folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def group_only() -> object:
    """A umask under which others may not read new files, nor anybody else write them."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("group_only")
def test_a_new_file_follows_the_umask_and_one_in_its_place_the_mode_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for wanted in (0o640, 0o604):
        with whole_file(path) as temporary:
            save_file({"w": torch.ones(2)}, temporary)  # makes files that nobody else may read
        assert oct(mode(path)) == oct(wanted)
        path.chmod(0o604)
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "words.txt").write_text("words")
    assert oct(mode(tmp_path / "folder")) == oct(0o750)
    (tmp_path / "folder").chmod(0o705)
    with whole_folder(tmp_path / "folder"):
        pass
    assert oct(mode(tmp_path / "folder")) == oct(0o705)


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    for words in ("first", "second"):  # the first time the links lead nowhere yet
        with whole_file(tmp_path / "file") as temporary:
            temporary.write_text(words)
        with whole_folder(tmp_path / "folder") as temporary:
            (temporary / "words").write_text(words)
        assert (tmp_path / "far/file").read_text() == (tmp_path / "far/folder/words").read_text() == words
    assert all(path.is_symlink() for path in (tmp_path / "file", tmp_path / "folder"))
    assert {path.name for path in tmp_path.rglob("*")} == {"far", "file", "folder", "words"}


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="is no regular file"), whole_file(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="this system leaves it to itself")
@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_content_is_on_the_disk_before_it_has_its_name(
    whole: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int | str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda opened: done.append(os.fstat(opened).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    with whole(tmp_path / "new") as temporary:
        content = [temporary / "words", temporary] if whole is whole_folder else [temporary]
        content[0].write_text("words")
        wanted = [path.stat().st_ino for path in (*content, tmp_path)]
    assert done == [*wanted[:-1], "renamed", wanted[-1]]
