"""The scikit-learn wrapper: real pipelines over real image files."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from repkit.dino import DinoExtractor
from repkit.heads.transformer import Transformer
from repkit.images import Resize

WIDTH = 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    small = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "img_size": 16, "num_classes": 0}
    return timm.create_model("vit_small_patch8_224", pretrained=False, dynamic_img_size=True, **small).eval()


@pytest.fixture(scope="module")
def extractor(model):
    return DinoExtractor(model)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Twelve dark and twelve bright images, and their labels."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    labels = np.arange(24) % 2
    paths = [folder / f"{index:02}.png" for index in range(24)]
    for path, label in zip(paths, labels, strict=True):
        Image.fromarray(rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(150 * label)).save(path)
    return paths, labels


def pipeline(extractor, **options):
    return Pipeline(
        [("features", Transformer(extractor, **options)), ("scale", StandardScaler()), ("head", LogisticRegression())]
    )


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_rows_are_the_pooled_features_in_order(extractor, dataset, batch_size):
    paths, _ = dataset
    rows = Transformer(extractor, batch_size=batch_size).transform(paths)
    expected = torch.cat([extractor([path])["norm"].mean((2, 3)) for path in paths]).numpy()
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_paths_strings_pil_images_and_tensors_agree(extractor, dataset):
    paths, _ = dataset
    images = [Image.open(path).convert("RGB") for path in paths]
    tensor = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    step = Transformer(extractor)
    expected = step.transform(paths)
    for same in (images, np.array([str(path) for path in paths]), np.array(paths, dtype=object), tensor):
        assert np.array_equal(step.transform(same), expected)


@pytest.mark.parametrize(("pool", "factor"), [("mean", 1), ("max", 1), ("gem", 1), ("2x2", 4)])
def test_width_and_names(extractor, dataset, pool, factor):
    step = Transformer(extractor, pool=pool)
    assert step.transform(dataset[0][:2]).shape == (2, factor * WIDTH)
    names = step.get_feature_names_out()
    assert (len(names), names[0], names[-1]) == (factor * WIDTH, "norm_0", f"norm_{factor * WIDTH - 1}")
    assert list(make_pipeline(step, StandardScaler()).fit(dataset[0]).get_feature_names_out()) == list(names)


def test_padding_is_left_out_of_the_mean(model):
    extract = DinoExtractor(model, resize=Resize(32, "pad"))
    image = Image.new("RGB", (32, 16), (255, 120, 0))  # two of four rows of patches
    expected = extract([image])["norm"][:, :, 1:3].mean((2, 3)).numpy()
    np.testing.assert_allclose(Transformer(extract).transform([image]), expected, rtol=1e-5, atol=1e-6)


def test_no_images_make_no_rows(extractor):
    assert Transformer(extractor, pool="2x2").transform([]).shape == (0, 4 * WIDTH)


def test_clones_share_the_network(extractor):
    step = Transformer(extractor, key="norm", pool="max", batch_size=3)
    copy = clone(pipeline(extractor, pool="max")).named_steps["features"]
    assert clone(step) is not step
    assert clone(step).get_params(deep=False) == step.get_params(deep=False)
    assert copy.extractor is extractor
    assert copy.pool == "max"


def test_pipeline_classifies_and_cross_validates(extractor, dataset):
    paths, labels = dataset
    fitted = pipeline(extractor).fit(paths[:16], labels[:16])
    assert fitted.score(paths[16:], labels[16:]) == 1
    assert np.array_equal(cross_val_score(pipeline(extractor), paths, labels, cv=3), np.ones(3))


def test_tensors_cross_validate(extractor):
    labels = np.arange(12) % 2
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.4
    images += 0.6 * torch.from_numpy(labels)[:, None, None, None]
    assert np.array_equal(cross_val_score(pipeline(extractor), images, labels, cv=3), np.ones(3))


def test_grid_search_over_pool(extractor, dataset):
    search = GridSearchCV(pipeline(extractor), {"features__pool": ["mean", "2x2"]}, cv=2, error_score="raise")
    search.fit(*dataset)
    assert search.best_score_ == 1
    assert [entry["features__pool"] for entry in search.cv_results_["params"]] == ["mean", "2x2"]


def test_set_output_names_the_columns(extractor, dataset):
    pandas = pytest.importorskip("pandas")
    frame = Transformer(extractor).set_output(transform="pandas").fit_transform(dataset[0][:3])
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == [f"norm_{index}" for index in range(WIDTH)]


def test_several_taps_need_a_key(model, dataset):
    several = DinoExtractor(model, "block.0,cls")
    with pytest.raises(ValueError, match="2 taps, block.0, cls; say which by key="):
        Transformer(several).fit(dataset[0])
    rows = Transformer(several, key="cls").fit_transform(dataset[0][:3])
    np.testing.assert_allclose(rows, several(dataset[0][:3])["cls"].flatten(1).numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "block.7"}, "no tap 'block.7' in the extractor; have norm"),
        ({"pool": "median"}, "no pooling 'median'"),
        ({"pool": "none"}, "pool='none' leaves maps"),
        ({"batch_size": 0}, "batch_size=0; give at least 1"),
    ],
)
def test_wrong_parameters_are_refused_by_fit_and_transform(extractor, dataset, options, message):
    step = Transformer(extractor, **options)
    with pytest.raises(ValueError, match=message):
        step.fit(dataset[0])
    with pytest.raises(ValueError, match=message):
        step.transform(dataset[0])
