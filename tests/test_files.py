"""Files that appear whole or not at all, whoever writes them and however often."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from clip_lens.files import in_folder, written_whole


@pytest.fixture
def umask():
    """A function that sets the process's umask for the test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_may_be_read_as_the_umask_says(tmp_path, umask, mask):
    umask(mask)
    with written_whole(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert mode(tmp_path / "a") == 0o666 & ~mask


def test_a_writer_that_puts_its_own_file_there_does_not_hide_it(tmp_path, umask):
    umask(0o022)
    with written_whole(tmp_path / "a") as temporary:
        (tmp_path / "own").write_text("x")
        (tmp_path / "own").chmod(0o600)
        os.replace(tmp_path / "own", temporary)
    assert mode(tmp_path / "a") == 0o644


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(OSError, match="disk full"), written_whole(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "before")]


def test_writers_at_one_time_leave_one_whole_file_and_the_umask(tmp_path, umask):
    umask(0o022)

    def write(number):
        with written_whole(tmp_path / "a") as temporary:
            temporary.write_text(f"{number}" * 50_000)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, [number % 10 for number in range(200)]))
    text = (tmp_path / "a").read_text()
    assert len(text) == 50_000 and len(set(text)) == 1 and list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert umask(0o022) == 0o022 and mode(tmp_path / "a") == 0o644


def test_a_folder_that_another_run_removes_is_made_again(tmp_path):
    removed = iter([True, True, False])

    def write():
        if next(removed):
            (tmp_path / "parts").rmdir()
        (tmp_path / "parts" / "a").write_text("x")

    in_folder(tmp_path / "parts", write)
    assert (tmp_path / "parts" / "a").read_text() == "x"


def test_what_can_never_be_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        in_folder(tmp_path / "parts", lambda: (tmp_path / "none" / "a").write_text("x"))
