import errno
import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from repkit.publishing import PART, file_sha256, made, parquet_bytes, publish, remove, sha256


def test_files_are_there_with_all_of_their_bytes(tmp_path):
    def total(file):
        file.write(b"%d" % (tmp_path / ("a" + PART)).stat().st_size)  # those before are written, and not in place

    (tmp_path / "a").write_bytes(b"old")
    publish(tmp_path, {"a": b"12345", "b": total})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"12345", "b": b"5"}


def test_of_a_failure_nothing_is_left_and_what_was_there_stays(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left") as told:
        publish(tmp_path, {"a": b"new", "b": fail})
    assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(tmp_path / "b"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_a_folder_that_cannot_be_written_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as told:
        publish(tmp_path / "no", {"a": b""})
    assert told.value.filename == str(tmp_path / "no" / "a")


def test_a_new_folder_goes_again_where_writing_fails(tmp_path):
    for folder, files in ((tmp_path / "new" / "folder", 0), (tmp_path / "used", 1)):
        if files:
            folder.mkdir()
        with pytest.raises(ValueError), made(folder):
            raise ValueError
        assert folder.exists() == bool(files)
    with made(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept").is_dir()


def test_removing_what_is_not_there_is_no_mistake(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    remove([tmp_path / "a", tmp_path / "b"])
    assert list(tmp_path.iterdir()) == []


def test_hashes_and_tables(tmp_path):
    content = parquet_bytes(pa.table({"x": [1, 2]}))
    (tmp_path / "a").write_bytes(content)
    assert sha256(content) == file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert pq.read_table(tmp_path / "a").to_pydict() == {"x": [1, 2]}
