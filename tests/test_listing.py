"""Lists of trees made by hand: which files, in which order, under which label and split."""

import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from repkit.images import decode
from repkit.listing import list_images


def touch(root: Path, *names: str) -> Path:
    """Empty files: a list never opens an image."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(source, **options) -> list[tuple]:
    table = list_images(source, **options)
    return list(zip(*(table.column(name).to_pylist() for name in ("id", "label", "split")), strict=True))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Folders


def test_a_folder_is_walked_and_sorted(tmp_path):
    images = ["b.PNG", "a.jpg", "sub/deep/c.tiff", "Z.webp", "sub/d.Jpeg", "e.gif", "f.bmp"]
    touch(tmp_path, *images, "notes.txt", ".hidden.png", ".git/x.png", "png", "README")
    table = list_images(tmp_path)
    assert table.column_names == ["id", "path", "label", "split", "prompt"]
    assert set(table.schema.types) == {pa.string()}
    assert table.column("id").to_pylist() == sorted(images)
    assert table.column("path").to_pylist() == [str(tmp_path / name) for name in sorted(images)]
    assert [table.column(name).null_count for name in ("label", "split", "prompt")] == [7, 7, 7]
    assert table.schema.metadata == {b"root": os.fsencode(tmp_path)}


def test_a_relative_folder_gives_absolute_paths(tmp_path, monkeypatch):
    touch(tmp_path, "photos/a.png")
    monkeypatch.chdir(tmp_path)
    assert list_images("photos").equals(list_images(tmp_path / "photos"))
    assert list_images("photos/").schema.metadata == {b"root": os.fsencode(tmp_path / "photos")}


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    touch(tmp_path, "x.png/y.png", "a.png")
    assert [name for name, *_ in listed(tmp_path)] == ["a.png", "x.png/y.png"]
    assert [name for name, *_ in listed(tmp_path / "x.png")] == ["y.png"]


def test_links_are_followed_but_not_round_in_a_loop(tmp_path):
    touch(tmp_path, "root/a.png", "elsewhere/b.png")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root")
    (tmp_path / "root/self.png").symlink_to(tmp_path / "root/self.png")
    (tmp_path / "root/far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/gone.png").symlink_to(tmp_path / "nowhere.png")
    names = [name for name, *_ in listed(tmp_path / "root")]
    assert names == ["a.png", "far/b.png", "gone.png", "self.png"]  # the broken ones fail where they are read
    for name in ("gone.png", "self.png"):
        with pytest.raises(OSError, match=name):
            decode(tmp_path / "root" / name)


def test_class_folders_are_labels(tmp_path):
    touch(tmp_path, "cat/1.png", "dog/2.png", "dog/puppies/3.png", "notes.txt")
    assert listed(tmp_path) == [
        ("cat/1.png", "cat", None),
        ("dog/2.png", "dog", None),
        ("dog/puppies/3.png", "dog", None),
    ]


@pytest.mark.parametrize("below", ["", "train/"])
def test_one_image_beside_the_folders_makes_them_plain_and_is_named(tmp_path, caplog, below):
    touch(tmp_path, f"{below}cat/1.png", f"{below}dog/2.png", f"{below}cover.png")
    with caplog.at_level(logging.WARNING, "repkit"):
        assert {label for _, label, _ in listed(tmp_path)} == {None}
    assert f"1 images in {tmp_path} lie beside folders" in caplog.text and f"{below}cover.png" in caplog.text


def test_nothing_is_said_of_images_alone_or_of_classes_alone(tmp_path, caplog):
    touch(tmp_path, "train/1.png", "train/2.png", "test/cat/3.png", "test/dog/4.png")
    with caplog.at_level(logging.WARNING, "repkit"):
        assert [label for _, label, _ in listed(tmp_path)] == ["cat", "dog", None, None]
    assert not caplog.records


@pytest.mark.parametrize("name, split", [("train", "train"), ("val", "val"), ("valid", "val"), ("validation", "val"),
                                         ("test", "test"), ("Test", "test"), ("Training", "train"),
                                         ("TESTING", "test"), ("dev", "val")])  # fmt: skip
def test_split_folders(tmp_path, name, split):
    touch(tmp_path, f"{name}/cat/1.png", f"{name}/dog/x/2.png")
    assert listed(tmp_path) == [(f"{name}/cat/1.png", "cat", split), (f"{name}/dog/x/2.png", "dog", split)]
    assert [row[1:] for row in listed(tmp_path, splits=False)] == [(name, None), (name, None)]


def test_each_split_is_plain_or_of_classes(tmp_path):
    touch(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/3.png", "test/more/4.png")
    assert [row[1:] for row in listed(tmp_path)] == [(None, "test"), (None, "test"), ("cat", "train"), ("dog", "train")]


@pytest.mark.parametrize("other, labels", [("extra/4.png", {"train", "test", "extra"}), ("4.png", {None})])
def test_splits_beside_other_images_are_none_and_say_so(tmp_path, caplog, other, labels):
    touch(tmp_path, "train/1.png", "test/2.png", other)
    with caplog.at_level(logging.WARNING, "repkit"):
        rows = listed(tmp_path)
    assert {label for _, label, _ in rows} == labels and {split for *_, split in rows} == {None}
    assert "test, train not taken as splits" in caplog.text


def test_names_of_any_script_and_spaces(tmp_path):
    names = sorted(["ä ö.png", "日本/1.png", "a,b.png", "'q\".png"])
    touch(tmp_path, *names)
    assert list_images(tmp_path).column("id").to_pylist() == names


def test_a_name_that_is_no_text_is_listed_by_its_bytes(tmp_path, caplog):
    folder = tmp_path / os.fsdecode(b"\xfe")
    try:
        folder.mkdir()
        (folder / os.fsdecode(b"\xff.png")).touch()
    except OSError:
        pytest.skip("this file system holds only names in UTF-8")
    with caplog.at_level(logging.WARNING, "repkit"):
        assert listed(tmp_path) == [("\\xfe/\\xff.png", "\\xfe", None)]
    assert "1 file names are not valid UTF-8, rename them" in caplog.text
    with pytest.raises(ValueError, match="not valid UTF-8; rename it"):
        list_images(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission_is_an_error(tmp_path):
    touch(tmp_path, "a.png", "secret/b.png")
    (tmp_path / "secret").chmod(0)
    try:
        with pytest.raises(PermissionError, match="secret"):
            list_images(tmp_path)
    finally:
        (tmp_path / "secret").chmod(0o700)


# Lists


def test_csv_keeps_order_words_and_nulls(tmp_path):
    text = 'label,path,prompt\n007,b/2.png,a photo\nNA,a.png,\nnull,b/../c.png,"x, y"\n,gone.png,null\n'
    table = list_images(write(tmp_path / "list.csv", text))
    assert table.to_pydict() == {
        "id": ["b/2.png", "a.png", "c.png", "gone.png"],
        "path": [str(tmp_path / name) for name in ("b/2.png", "a.png", "c.png", "gone.png")],
        "label": ["007", "NA", "null", None],
        "split": [None] * 4,
        "prompt": ["a photo", None, "x, y", "null"],
    }
    assert table.schema.metadata == {b"root": os.fsencode(tmp_path)}


def test_paths_outside_of_the_lists_folder(tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    text = f"path\n{tmp_path}/lists/in.png\n../up.png\n{tmp_path}/out.png\n"
    table = list_images(write(folder / "list.csv", text))
    assert table.column("id").to_pylist() == ["in.png", "../up.png", f"{tmp_path}/out.png"]
    assert table.column("path").to_pylist() == [f"{tmp_path}/lists/in.png", f"{tmp_path}/up.png", f"{tmp_path}/out.png"]


def test_ids_and_splits_of_a_list(tmp_path):
    text = "\ufeffpath,id,split\na.png,first,train\nb.png,second,valid\nc.png,,Validation\nd.png,d,fold 3\n"
    assert listed(write(tmp_path / "LIST.CSV", text)) == [
        ("first", None, "train"),
        ("second", None, "val"),
        ("c.png", None, "val"),
        ("d", None, "fold 3"),
    ]


def test_parquet_reads_like_csv(tmp_path):
    labels = pa.array(["cat", "dog"]).dictionary_encode()
    table = pa.table({"path": pa.array(["a.png", "b.png"], pa.large_string()), "label": labels, "split": ["test"] * 2})
    pa.parquet.write_table(table, tmp_path / "list.parquet")
    text = "path,label,split\na.png,cat,test\nb.png,dog,test\n"
    assert list_images(tmp_path / "list.parquet").equals(list_images(write(tmp_path / "list.csv", text)))


def test_parquet_numbers_become_text(tmp_path):
    pa.parquet.write_table(pa.table({"path": ["a.png", "b.png"], "label": [3, None]}), tmp_path / "list.parquet")
    assert listed(tmp_path / "list.parquet") == [("a.png", "3", None), ("b.png", None, None)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_columns_are_named_in_a_warning(tmp_path, caplog, kind):
    path = write(tmp_path / "list.csv", "path,width,when\na.png,3,x\n")
    if kind == "parquet":
        path = tmp_path / "list.parquet"
        pa.parquet.write_table(pa.table({"path": ["a.png"], "width": [3], "when": [{"deep": [1]}]}), path)
    with caplog.at_level(logging.WARNING, "repkit"):
        assert listed(path) == [("a.png", None, None)]
    assert "columns not used: width, when" in caplog.text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "cannot read the list .*list.csv"),
        ("path\n", "has no rows"),
        ("file,label\na.png,1\n", "no column path; it has file, label, and needs path"),
        ("path;label\na.png;1\n", "no column path; it has path;label"),
        ("path,path\na.png,b.png\n", "several columns path"),
        ("path,label\na.png,1,2\n", "cannot read the list"),
        ("path,label\na.png,1\n,2\n,3\n", r"no path in row 2 \(2 such rows\)"),
        ("path\na.png\nb.png\n./a.png\n", "1 ids occur more than once: a.png; list"),
        ("path,id\na.png,x\nb.png,x\n", "once: x;"),
    ],
)
def test_bad_lists_are_value_errors(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list_images(write(tmp_path / "list.csv", text))


def test_lists_of_other_bytes_are_value_errors(tmp_path):
    pa.parquet.write_table(pa.table({"path": [["a.png"]]}), tmp_path / "nested.parquet")
    (tmp_path / "latin.csv").write_bytes(b"path\n\xe4.png\n")
    (tmp_path / "noise.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "empty.parquet").touch()
    for name in ("nested.parquet", "latin.csv", "noise.parquet", "empty.parquet"):
        with pytest.raises(ValueError, match=f"cannot read the list .*{name}") as caught:
            list_images(tmp_path / name)
        assert "\n" not in str(caught.value)


# Paths


def test_a_sequence_keeps_its_order_below_a_common_root(tmp_path):
    paths = [tmp_path / "b/2.png", str(tmp_path / "a/1.png"), tmp_path / "a/gone"]
    table = list_images(paths)
    assert table.column("id").to_pylist() == ["b/2.png", "a/1.png", "a/gone"]
    assert table.column("path").to_pylist() == [str(path) for path in paths]
    assert table.schema.metadata == {b"root": os.fsencode(tmp_path)}
    with pytest.raises(ValueError, match="b/2.png"):
        list_images([*paths, paths[0]])


def test_one_image_is_a_list_of_one(tmp_path):
    touch(tmp_path, "one.JPG", "other.png")
    assert listed(tmp_path / "one.JPG") == [("one.JPG", None, None)] == listed([tmp_path / "one.JPG"])


def test_nothing_to_list_is_an_error_that_says_what_was_sought(tmp_path):
    touch(tmp_path, "notes.txt", "empty/.png", ".hidden/a.png")
    with pytest.raises(ValueError, match=r"no image in .* or below; looked for .png, .jpg"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="is no folder, no list .* and no image"):
        list_images(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="sequence of images is empty"):
        list_images([])
    with pytest.raises(FileNotFoundError, match="no such folder, list or image: .*gone"):
        list_images(tmp_path / "gone")
