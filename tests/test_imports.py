"""Who may import whom: read from the source, so that a cycle or a layer crossed shows before it hurts."""

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import repkit

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("heads", "datasets", "recipes")  # beside the package in a checkout, inside it when installed
# In this order: each may import those before it.
NUMERIC = [
    *"taps features images noise betas schedulers schedule precision".split(),
    *"attention capture compiling pooling massive matching".split(),
]
CORE = [
    *NUMERIC,
    *"backbones.conditions backbones.hashing backbones.prompts backbones.base backbones sampling".split(),
    *"trimming extractors dino mirrored bases fusion listing zeroshot".split(),
    *"decoding publishing shards planning pipeline store exporting".split(),
    *"ann where indexfiles indexitems indexsources retrieval".split(),
    *"pipelinefolder checkpoints catalog hub overlays outlines zoo progress".split(),
]
# What each layer may import from repkit; its own name is there for files of one folder.
REACH = {name: {*CORE[: i + 1]} for i, name in enumerate(CORE)}
REACH |= {name: {*CORE, name} for name in ("heads", "datasets")}
REACH["tasks"] = {*CORE, "heads", "datasets", "tasks"}
REACH["recipes"] = REACH["tasks"] | {"recipes"}
REACH["service"] = REACH["tasks"] | {"service"}
REACH["cli"] = REACH["recipes"] | {"service", "cli", ""}  # "": repkit itself, whose lazy names reach everything
LIGHT = {*sys.stdlib_module_names, "torch", "numpy", "PIL", "einops", "jaxtyping"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the library below repkit, by its dotted name without the leading `repkit.`."""
    found = {}
    for base, prefix in [(root / "repkit", ""), *((root / folder, f"{folder}.") for folder in FOLDERS)]:
        for path in sorted(base.rglob("*.py")):
            name = prefix + ".".join(path.relative_to(base).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    found.pop("__init__", None)  # the lazy table is checked by a test of its own
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """Absolute dotted targets of every import statement, wherever it stands in the file."""
    package = ["repkit", *name.split(".")][: None if path.stem == "__init__" else -1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def layer(name: str) -> str:
    """The module's place in CORE, by its name or by its folder."""
    own = ".".join(name.split(".")[:2])
    return own if own in CORE else name.partition(".")[0]


def violations(root: Path) -> list[str]:
    """One line for each import that crosses a layer."""
    wrong = []
    for name, path in modules(root).items():
        for target in imports(name, path):
            top, _, rest = target.partition(".")
            if top == "repkit":
                allowed = rest == "__version__" or layer(rest) in REACH.get(layer(name), ())
            elif top in FOLDERS:
                allowed = target.startswith("datasets.") and layer(name) == "datasets"  # Hugging Face's
            elif top in ("lightning", "pytorch_lightning"):
                allowed = layer(name) == "recipes"
            else:
                allowed = top not in PICKLES and (layer(name) not in NUMERIC or top in LIGHT)
            if not allowed:
                wrong.append(f"{name} imports {target}")
    return wrong


def unsafe_loads(source: str) -> list[int]:
    """Lines that could run code from a file: remote code, or weights and arrays read through pickle."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: isinstance(k.value, ast.Constant) and k.value.value for k in node.keywords}
        torch_load = ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True
        if torch_load or given.get("trust_remote_code") or given.get("allow_pickle"):
            lines.append(node.lineno)
    return lines


def run(code: str, *arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_import_crosses_a_layer() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("repkit/taps.py", "from repkit.features import Features"),
        ("repkit/taps.py", "from .features import Features"),
        ("repkit/features.py", "from repkit import schedule"),
        ("repkit/features.py", "import repkit"),
        ("repkit/noise.py", "import diffusers"),
        ("repkit/backbones/base.py", "from repkit.backbones.unet import UNet"),
        ("repkit/backbones/unet.py", "from repkit.extractors import DiffusionExtractor"),
        ("repkit/zoo.py", "from repkit.heads.ridge import Ridge"),
        ("repkit/zoo.py", "from repkit.tasks import probe"),
        ("repkit/zoo.py", "import lightning.pytorch"),
        ("repkit/tasks/probe.py", "def f():\n    from repkit.recipes import pretrain"),
        ("repkit/tasks/probe.py", "import repkit.cli"),
        ("repkit/tasks/probe.py", "import heads.ridge"),
        ("repkit/store.py", "import pickle"),
        ("heads/ridge.py", "from repkit.datasets import folder"),
        ("heads/ridge.py", "from lightning import Trainer"),
        ("datasets/folder.py", "from repkit.heads.ridge import Ridge"),
        ("recipes/pretrain.py", "from repkit.cli import main"),
        ("repkit/unheard.py", "from repkit.taps import Tap"),
    ],
)
def test_a_seeded_violation_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("repkit/features.py", "import torch\nfrom repkit.taps import Tap"),
        ("repkit/backbones/unet.py", "import diffusers\nfrom .base import Backbone\nfrom ..schedule import Schedule"),
        ("repkit/backbones/__init__.py", "from .base import Backbone"),
        ("repkit/exporting.py", "from repkit import __version__\nfrom repkit import store"),
        ("heads/ridge.py", "from repkit.pooling import pool\nfrom .knn import knn"),
        ("datasets/folder.py", "from datasets import load_dataset\nfrom repkit.datasets.pairs import pairs"),
        ("recipes/pretrain.py", "import lightning\nfrom repkit.datasets.fashion import fashion"),
        ("repkit/cli/fit.py", "def fit():\n    from repkit.recipes import pretrain"),
        ("repkit/__init__.py", "from repkit.zoo import load"),
    ],
)
def test_a_lawful_import_is_left_alone(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path) == []


def test_nothing_loads_pickles_or_remote_code() -> None:
    unsafe = {name: unsafe_loads(path.read_text()) for name, path in modules(ROOT).items()}
    assert {name: lines for name, lines in unsafe.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.load(path)", [1]),
        ("torch.load(path, weights_only=False)", [1]),
        ("torch.load(path, weights_only=True)", []),
        ("\nload(name, trust_remote_code=True)", [2]),
        ("np.load(path, allow_pickle=True)", [1]),
        ("np.load(path, allow_pickle=False)", []),
    ],
)
def test_unsafe_loads_are_seen(source: str, lines: list[int]) -> None:
    assert unsafe_loads(source) == lines


@pytest.mark.parametrize("folder", FOLDERS)
def test_top_level_folders_are_namespaces(folder: str) -> None:
    # With an __init__.py the repository root would hide Hugging Face's `datasets`.
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_every_module_imports_and_leaves_no_trace(tmp_path: Path) -> None:
    code = """if True:
        import importlib, json, logging, sys, torch
        state, handlers, failed = torch.get_rng_state(), list(logging.root.handlers), {}
        for name in sys.argv[1:]:
            try:
                importlib.import_module(name)
            except Exception as error:
                failed[name] = repr(error)
        untouched = torch.equal(state, torch.get_rng_state()) and handlers == logging.root.handlers
        print(json.dumps([failed, untouched, torch.get_default_dtype() == torch.float32]))"""
    names = [f"repkit.{name}" for name in modules(ROOT) if not name.endswith("__main__")]
    assert json.loads(run(code, *names, cwd=tmp_path).splitlines()[-1]) == [{}, True, True]


def test_importing_repkit_and_its_command_line_does_not_import_torch(tmp_path: Path) -> None:
    code = """if True:
        import sys, repkit
        dir(repkit), repkit.__version__
        for name in sys.argv[1:]:
            __import__(name)
        print(sorted({"torch", "numpy", "diffusers", "matplotlib"} & set(sys.modules)))"""
    names = [f"repkit.{name}" for name in modules(ROOT) if layer(name) == "cli"]
    assert run(code, *names, cwd=tmp_path).strip() == "[]"


def test_the_lazy_table_agrees_with_what_type_checkers_see() -> None:
    seen: dict[str | None, str] = {}
    for node in ast.walk(ast.parse(Path(repkit.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repkit."):
            seen |= {alias.asname: str(node.module).removeprefix("repkit.") for alias in node.names}
    assert seen == repkit._MODULE_OF
    assert set(repkit.__all__) == {"__version__", *seen}
    assert set(repkit.__all__) <= set(dir(repkit))


@pytest.mark.parametrize("name", sorted(repkit._MODULE_OF))
def test_a_public_name_is_that_of_its_module(name: str) -> None:
    module = repkit._MODULE_OF[name]
    if module not in modules(ROOT):
        pytest.skip(f"repkit.{module} is not written yet")
    assert getattr(repkit, name) is getattr(importlib.import_module(f"repkit.{module}"), name)


def test_no_public_name_hides_a_module() -> None:
    assert not set(repkit.__all__) & set(modules(ROOT))


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(AttributeError, match="no name 'laod' in repkit.*load"):
        repkit.laod  # noqa: B018
