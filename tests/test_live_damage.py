"""Damaged, swapped, missing and foreign files, a full disk, a second owner: a clear error or recovery."""

import errno
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from repkit.service import store as store_module
from repkit.service.live import LiveIndex
from tests.live_cases import Shadow, assert_same, items_of, write_base
from tests.live_kill import ROOT

NEW = [f"new-{place}" for place in range(6)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """An index with a segment and some later changes; `crashed` copies it as a kill would leave it."""
    return tmp_path / "index"


@pytest.fixture
def shadow(folder) -> Shadow:
    shadow = write_base(folder)
    with LiveIndex.open(folder) as live:
        live.upsert(items_of(NEW, 1))
        shadow.upsert(NEW, 1)
        live.delete(["base-3"])
        shadow.delete(["base-3"])
    return shadow


def flip(path: Path, at: int, bits: int = 0xFF) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


def place_of(path: Path, content: bytes) -> int:
    found = path.read_bytes().find(content)
    assert found >= 0
    return found


def segment_file(folder: Path, name: str) -> Path:
    return next((folder / "live" / "segments").glob(f"SEG-*/{name}"))


@pytest.mark.parametrize("name", ["index.faiss", "items.parquet"])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "empty", "missing", "swapped"])
def test_a_damaged_segment_is_built_again(folder, shadow, caplog, name, harm):
    path = segment_file(folder, name)
    if harm == "flipped":
        flip(path, path.stat().st_size // 2)
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "missing":
        path.unlink()
    else:
        write_base(folder.with_name("other"), 30, "l2")
        shutil.copy(folder.with_name("other") / name, path)
    with caplog.at_level(logging.WARNING, "repkit"), LiveIndex.open(folder) as live:
        assert_same(live, shadow)
    assert "built again from the database" in caplog.text
    caplog.clear()
    with LiveIndex.open(folder) as live:
        assert_same(live, shadow)
    assert caplog.text == ""


def test_a_missing_segments_folder_is_built_again(folder, shadow):
    shutil.rmtree(folder / "live" / "segments")
    for _ in range(2):
        with LiveIndex.open(folder) as live:
            assert_same(live, shadow)


def test_a_flipped_byte_of_a_new_vector_stops_the_opening(folder, shadow):
    path = folder / "live" / "live.db"
    flip(path, place_of(path, shadow.items["new-2"][0].tobytes()) + 5)
    with pytest.raises(OSError, match="vector of 'new-2' does not fit.*restore a snapshot"):
        LiveIndex.open(folder)


def test_a_flipped_byte_of_a_vector_in_a_segment_is_found_when_it_is_read(folder, shadow):
    path = folder / "live" / "live.db"
    flip(path, place_of(path, shadow.items["base-5"][0].tobytes()))
    with LiveIndex.open(folder) as live:
        with pytest.raises(OSError, match="vector of 'base-5'"):
            live.get("base-5")
        with pytest.raises(OSError, match="vector of 'base-5'"):
            live.compact()
        assert len(live) == len(shadow.items)
        assert live.get("base-6").metadata == shadow.items["base-6"][1]
        live.upsert(items_of(["base-5"], 3))  # given again, it is whole
        live.compact()
        shadow.upsert(["base-5"], 3)
        assert_same(live, shadow)


@pytest.mark.parametrize("bits", [0x01, 0xFF])  # other text, and none at all
@pytest.mark.parametrize("text", [b'"stamp":1', b"new-4"])
def test_flipped_text_is_found(folder, shadow, text, bits):
    path = folder / "live" / "live.db"
    flip(path, place_of(path, text) + len(text) - 1, bits)
    with pytest.raises(OSError, match="is damaged.*restore a snapshot"):
        LiveIndex.open(folder)


def test_vectors_that_changed_places_are_found(folder, shadow):
    with sqlite3.connect(folder / "live" / "live.db") as database:
        one, other = (
            database.execute("SELECT vector, vector_crc FROM items WHERE id = ?", (name,)).fetchone()
            for name in NEW[:2]
        )
        database.execute("UPDATE items SET vector = ?, vector_crc = ? WHERE id = ?", (*one, NEW[1]))
        database.execute("UPDATE items SET vector = ?, vector_crc = ? WHERE id = ?", (*other, NEW[0]))
    database.close()
    with pytest.raises(OSError, match="does not fit its checksum"):
        LiveIndex.open(folder)


@pytest.mark.parametrize("harm", ["empty", "truncated", "nonsense", "header", "missing", "other table"])
def test_a_damaged_database_is_refused(folder, shadow, harm):
    path = folder / "live" / "live.db"
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "other table":
        path.unlink()
        sqlite3.connect(path).execute("CREATE TABLE meta (name, value)").connection.close()
    else:
        cut = {"empty": b"", "truncated": content[: len(content) // 2], "nonsense": b"x" * 9000}
        path.write_bytes(cut.get(harm, b"\0" * 100 + content[100:]))
    with pytest.raises(OSError, match="damaged.*restore a snapshot"):
        LiveIndex.open(folder)


@pytest.mark.parametrize("version", [0, 2])
def test_another_format_version_is_refused(folder, shadow, version):
    with sqlite3.connect(folder / "live" / "live.db") as database:
        database.execute("UPDATE meta SET value = ? WHERE name = 'version'", (json.dumps(version),))
    database.close()
    with pytest.raises(ValueError, match=f"format version {version}; this repkit reads 1"):
        LiveIndex.open(folder)


def crashed(folder: Path, to: Path) -> Path:
    """A copy of the index as it would be after a kill at this moment, with its write-ahead log."""
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_a_damaged_journal_does_not_pass_for_an_older_state(folder, shadow, tmp_path, harm):
    with LiveIndex.open(folder) as live:
        for stamp in range(5, 10):
            live.upsert(items_of(["late"], stamp))
        copy = crashed(folder, tmp_path / "copy")
        whole = crashed(folder, tmp_path / "whole")
    path = copy / "live" / "live.db-wal"
    if harm == "flipped":
        flip(path, path.stat().st_size // 2)
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(OSError, match="was acknowledged and the last one there is"):
        LiveIndex.open(copy)
    (copy / "live" / "acknowledged").unlink()  # to go on without them
    with LiveIndex.open(copy) as live:
        assert live.version < 7
    shadow.upsert(["late"], 9)
    with LiveIndex.open(whole) as live:
        assert_same(live, shadow)


def test_an_older_database_put_back_is_refused(folder, shadow, tmp_path):
    shutil.copy(folder / "live" / "live.db", tmp_path / "older.db")
    with LiveIndex.open(folder) as live:
        live.upsert(items_of(["late"], 5))
    shutil.copy(tmp_path / "older.db", folder / "live" / "live.db")
    with pytest.raises(OSError, match="change 3 was acknowledged and the last one there is 2"):
        LiveIndex.open(folder)


def test_changes_of_another_index_are_refused(folder, shadow, tmp_path):
    write_base(tmp_path / "other", 31)
    shutil.copytree(folder / "live", tmp_path / "other" / "live")
    with pytest.raises(ValueError, match="changes of another index"):
        LiveIndex.open(tmp_path / "other")


def test_what_is_no_index_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such index"):
        LiveIndex.open(tmp_path / "never")
    with pytest.raises(ValueError, match="is no index"):
        LiveIndex.open(tmp_path)
    assert not (tmp_path / "live").exists()
    write_base(tmp_path / "index")
    flip(tmp_path / "index" / "index.faiss", 200)
    with pytest.raises(ValueError, match="index.faiss is damaged"):
        LiveIndex.open(tmp_path / "index")


def test_a_second_owner_is_refused_by_name_and_a_dead_one_is_not_in_the_way(folder, shadow):
    code = """if True:
        import sys
        from repkit.service.live import LiveIndex
        live = LiveIndex.open(sys.argv[1])
        print("open", flush=True)
        input()"""
    command = [sys.executable, "-c", code, str(folder)]
    other = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "open\n"
    with pytest.raises(BlockingIOError, match=f"process {other.pid} on .* has this index open"):
        LiveIndex.open(folder)
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    with LiveIndex.open(folder) as live:
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
            LiveIndex.open(folder)
        assert_same(live, shadow)


def test_a_closed_index_says_so(folder, shadow):
    live = LiveIndex.open(folder)
    live.close()
    live.close()
    for call in (lambda: live.upsert(items_of(["a"], 1)), lambda: live.get("a"), lambda: live.delete(["a"])):
        with pytest.raises(OSError, match="is closed; open it again"):
            call()


def test_a_damaged_snapshot_is_not_restored(folder, shadow, tmp_path):
    with LiveIndex.open(folder) as live:
        live.snapshot_to("one")
        live.snapshot_to("two")
    flip(folder / "live" / "snapshots" / "one" / "live.db", 5000)
    with pytest.raises(ValueError, match="damaged"):
        LiveIndex.restore(folder, "one")
    (folder / "live" / "snapshots" / "two" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        LiveIndex.restore(folder, "two")
    with LiveIndex.open(folder) as live:
        assert_same(live, shadow)
        assert [one.name for one in live.snapshots()] == ["one"]


def test_a_snapshot_with_a_damaged_list_of_files_is_restored_without_it(folder, shadow, tmp_path, caplog):
    with LiveIndex.open(folder) as live:
        live.snapshot_to("good")
    items = folder / "live" / "snapshots" / "good" / "items.parquet"
    content = items.read_bytes()
    items.unlink()  # it is a link to that of the index
    items.write_bytes(content[:-1])
    LiveIndex.restore(folder, "good", tmp_path / "new")
    assert "items.parquet is damaged" in caplog.text and not (tmp_path / "new" / "items.parquet").exists()
    with LiveIndex.open(tmp_path / "new") as live:
        assert_same(live, shadow)


def test_a_restore_helps_where_the_database_is_damaged(folder, shadow):
    with LiveIndex.open(folder) as live:
        live.snapshot_to("one")
        live.upsert(items_of(["late"], 5))
    (folder / "live" / "live.db").write_bytes(b"")
    LiveIndex.restore(folder, "one")
    with LiveIndex.open(folder) as live:
        assert_same(live, shadow)


def in_a_child(folder: Path, bytes_more: int) -> subprocess.CompletedProcess:
    """Change an index while no file may grow beyond a size, as on a full disk; what it says of it."""
    code = """if True:
        import json, resource, signal, sys
        from pathlib import Path
        from repkit.service.live import LiveIndex
        from tests.live_cases import items_of
        live = LiveIndex.open(sys.argv[1], flush_rows=10**6)
        live.upsert(items_of(["first"], 11))
        largest = max(path.stat().st_size for path in Path(sys.argv[1]).glob("live/live.db*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest + int(sys.argv[2]), resource.RLIM_INFINITY))
        told = {}
        calls = {"upsert": lambda: live.upsert(items_of([f"more-{n}" for n in range(4000)], 2)),
                 "compact": live.compact, "snapshot": lambda: live.snapshot_to("one")}
        for name, call in calls.items():
            try:
                call()
                told[name] = None
            except OSError as error:
                told[name] = [error.errno, str(error), live.degraded]
        told["state"] = [len(live), live.version, len(live.search(items_of(["q"], 1)[0].vector[None], 3).hits[0])]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        live.upsert(items_of(["last"], 13))
        told["after"] = [len(live), live.degraded]
        live.close()
        print(json.dumps(told))"""
    command = [sys.executable, "-c", code, str(folder), str(bytes_more)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_files_that_cannot_grow_fail_the_change_and_nothing_else(folder, shadow):
    done = in_a_child(folder, 10_000)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    number, message, degraded = told["upsert"]
    assert number in (errno.EIO, errno.ENOSPC) and "live.db" in message and degraded
    count = len(shadow.items)
    assert told["state"] == [count + 1, 3, 3]
    assert told["after"] == [count + 2, None]
    shadow.upsert(["first"], 11)
    shadow.upsert(["last"], 13)
    with LiveIndex.open(folder) as live:
        assert_same(live, shadow)


def mount(folder: Path, size: str) -> bool:
    folder.mkdir()
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode
        == 0
    )


def test_a_full_disk_is_told_and_reads_go_on(tmp_path):
    disk = tmp_path / "disk"
    if os.geteuid() != 0 or not mount(disk, "1m"):
        pytest.skip("no small file system can be mounted here")
    try:
        shadow = write_base(disk / "index")
        with LiveIndex.open(disk / "index", flush_rows=10**6) as live:
            stamp = 0
            with pytest.raises(OSError) as full:
                while True:
                    stamp += 1
                    ids = [f"new-{stamp}-{place}" for place in range(100)]
                    live.upsert(items_of(ids, stamp))
                    shadow.upsert(ids, stamp)
            assert full.value.errno == errno.ENOSPC and "No space left" in live.degraded
            assert_same(live, shadow)
            for call in (live.compact, lambda: live.snapshot_to("one")):
                with pytest.raises(OSError) as full:
                    call()
                assert full.value.errno == errno.ENOSPC
            assert live.snapshots() == []
            assert_same(live, shadow)
        with LiveIndex.open(disk / "index") as live:
            assert_same(live, shadow)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            live.upsert(items_of(["last"], 99))
            shadow.upsert(["last"], 99)
            live.compact()
            assert live.degraded is None
            assert_same(live, shadow)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_without_room_for_the_first_opening_leaves_the_index_as_built(tmp_path):
    disk = tmp_path / "disk"
    if os.geteuid() != 0 or not mount(disk, "500k"):
        pytest.skip("no small file system can be mounted here")
    try:
        shadow = write_base(disk / "index", 3000)
        with pytest.raises(OSError) as full:
            LiveIndex.open(disk / "index")
        assert full.value.errno == errno.ENOSPC
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        with LiveIndex.open(disk / "index") as live:
            assert_same(live, shadow)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_failed_commit_fails_every_change_of_its_group_and_is_forgotten(folder, shadow, monkeypatch):
    with LiveIndex.open(folder) as live:

        def fail(*_):
            raise OSError(errno.ENOSPC, "No space left on device", "live.db")

        with monkeypatch.context() as patch:
            patch.setattr(store_module, "commit", fail)
            with pytest.raises(OSError, match="No space left"):
                live.delete(["base-1"])
            assert "No space left" in live.degraded
        assert_same(live, shadow)
        live.delete(["base-1"])
        assert live.degraded is None


def test_nothing_of_torch_is_needed():
    code = "import sys, repkit.service.live; print('torch' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


def test_a_change_that_cannot_be_published_ends_the_index_and_is_there_after_it_is_opened_again(
    folder, shadow, monkeypatch
):
    with LiveIndex.open(folder) as live:

        def fail(*_):
            raise MemoryError

        monkeypatch.setattr(live._store, "_publish", fail)
        with pytest.raises(MemoryError):
            live.delete(["base-1"])
        monkeypatch.undo()
        with pytest.raises(OSError, match="open it again"):
            live.delete(["base-2"])
    shadow.delete(["base-1"])
    with LiveIndex.open(folder) as live:
        assert_same(live, shadow)
