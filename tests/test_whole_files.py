"""A kill leaves the old file or the new one."""

import pytest

from pspnet_jax.whole_files import whole_file, write_whole

BUDGET_SECONDS = 10


def test_files_are_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "text")
    assert path.read_text() == "text"
    write_whole(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"\0\1"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_half_a_file_is_none(tmp_path):
    path = tmp_path / "new" / "file"
    write_whole(path, b"old")

    def write_half():
        with whole_file(path) as file:
            file.write(b"half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        write_half()
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]
