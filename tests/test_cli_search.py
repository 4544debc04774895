import json

import pytest
from PIL import Image

from repkit.cli.search import _bytes, _conditions
from repkit.exporting import export
from repkit.extractors import DiffusionExtractor
from repkit.retrieval import Index
from repkit.zoo import load
from tests.export_cases import write_image


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Twelve noisy pictures of two labels and two sizes, on the bundled model."""
    root = tmp_path_factory.mktemp("pictures")
    for seed in range(12):
        folder = root / ("bag" if seed % 3 else "coat")
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{seed:02}.png", seed)
        if seed % 2:
            with Image.open(folder / f"{seed:02}.png") as picture:
                picture.resize((48, 48)).save(folder / f"{seed:02}.png")
    extractor = DiffusionExtractor(load("mini-unet"), ["mid@50"])
    return export(root, extractor, tmp_path_factory.mktemp("stores") / "store", workers=0)


@pytest.fixture(scope="module", params=["flat", "hnsw", "ivf"])
def index(request, store, tmp_path_factory):
    out = tmp_path_factory.mktemp("indexes") / request.param
    Index.build(store, kind=request.param).save(out)
    return out


def test_the_index_that_was_chosen_is_told(repkit, store, tmp_path):
    code, out, err = repkit("index", store.path, "-o", tmp_path / "a")
    assert (code, out.strip()) == (0, str(tmp_path / "a"))
    assert "12 vectors of 128 numbers, mid@50\nflat; recall@10 1.000; 512 bytes a vector" in err
    code, out, _ = repkit("index", store.path, "-o", tmp_path / "b", "--kind", "ivf", "--metric", "l2", "--json")
    told = json.loads(out)
    assert (told["kind"], told["parameters"], told["recall"]) == ("ivf", {"nlist": 1, "nprobe": 1}, None)
    assert (Index.load(tmp_path / "b").kind, Index.load(tmp_path / "b").metric) == ("ivf", "l2")
    code, _, err = repkit("index", store.path, "-o", tmp_path / "b", "--kind", "hnsw")
    assert code == 0 and "recall@10 not measured, too few vectors" in err


def test_a_filter_is_given_by_a_value_or_by_json(repkit, store, index):
    query = store.table["path"].to_pylist()[0]
    for where, count, label in [
        (["--where", "label=coat"], 4, "coat"),
        (["--where", '{"label": {"ne": "coat"}}'], 8, "bag"),
        (["--where", "label=bag", "--where", "width=48"], 4, "bag"),
        (["--where", '{"label": ["bag"], "width": {"gt": 40}}'], 4, "bag"),
        (["--where", "label=none"], 0, None),
    ]:
        code, out, err = repkit("search", index, query, "-k", 20, "--json", *where)
        assert code == 0, err
        told = json.loads(out)
        assert ("no image of the index is as --where says" in err) == (count == 0)
        assert len(told["hits"]) == count and {hit["label"] for hit in told["hits"]} <= {label}
    code, out, _ = repkit("search", index, query, "--exact", "--json")
    assert json.loads(out)["exact"] and len(json.loads(out)["hits"]) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "weight=3"], "no column 'weight' to filter by; have height, id, label, path"),
        (["--where", "label"], "--where label; give COLUMN=VALUE or a JSON object"),
        (["--where", "{label}"], "is no JSON"),
        (["--where", "width=wide"], "width holds int and is compared with 'wide', a str"),
        (["--where", "label=a", "--where", "label=b"], "names label twice"),
        (["--ef", "3"], "ef=3 is for hnsw; this index is ivf"),
        (["--nprobe", "0"], "--nprobe"),
        (["-k", "0"], "-k"),
    ],
)
def test_a_mistake_is_one_line(repkit, store, tmp_path_factory, options, message):
    out = tmp_path_factory.mktemp("indexes") / "ivf"
    Index.build(store, kind="ivf").save(out)
    code, printed, err = repkit("search", out, store.table["path"].to_pylist()[0], *options)
    assert (code, printed, err.count("\n")) == (2, "", 1) and message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recall", "2"], "recall=2.0; give a share from above 0 to 1"),
        (["--memory", "lots"], "--memory lots; give bytes, or a number with kB, MB, GB or TB"),
        (["--memory", "1kB"], "memory=1000 bytes for 12 vectors of 128; the smallest kind takes 6144"),
        (["--kind", "ivf-pq"], '"ivf-pq" learns from 9984 vectors or more and has 12'),
        (["--kind", "lsh"], "lsh"),
    ],
)
def test_what_cannot_be_indexed_is_one_line(repkit, store, tmp_path, options, message):
    code, printed, err = repkit("index", store.path, "-o", tmp_path / "out", *options)
    assert (code, printed, err.count("\n")) == (2, "", 1) and message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "count"), [("12", 12), ("3kB", 3000), ("1.5 MB", 1_500_000), ("2GB", 2 * 10**9), ("2g", 2 * 10**9)]
)
def test_sizes_in_words(text, count):
    assert _bytes(text) == count


def test_values_are_read_as_their_columns_are():
    columns = {"label": str, "width": int, "good": bool}
    assert _conditions(["label=3", "width=3", "good=true"], columns) == {"label": "3", "width": 3, "good": True}
    assert _conditions(["label=a=b"], columns) == {"label": "a=b"}
    assert _conditions(None, columns) is None


def test_an_index_with_changes_is_not_replaced_and_is_searched_as_built(repkit, store, tmp_path):
    query = store.table["path"].to_pylist()[0]
    assert repkit("index", store.path, "-o", tmp_path / "a")[0] == 0
    (tmp_path / "a" / "live").mkdir()
    code, _, err = repkit("index", store.path, "-o", tmp_path / "a")
    assert code == 2 and "has changes that repkit serve has made" in err and "index:" not in err  # before it is built
    code, _, err = repkit("search", tmp_path / "a", query)
    assert code == 0 and "is searched as it was built" in err
