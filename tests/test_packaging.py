"""What is installed is what was written: the wheel's content, the pins, and Hugging Face's `datasets` left visible."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {"repkit": "repkit", "heads": "repkit/heads", "datasets": "repkit/datasets", "recipes": "repkit/recipes"}
NOISE = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Output of a command; `path` goes in front of what is installed, as PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(root: Path) -> set[str]:
    """Where each file of the library belongs in an installation."""
    return {
        (Path(home) / path.relative_to(root / folder)).as_posix()
        for folder, home in MAPPED.items()
        for path in (root / folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: a build writes build/ and egg-info beside its sources."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in filter(lambda name: (ROOT / name).is_dir(), MAPPED):
        shutil.copytree(ROOT / folder, copy / folder, ignore=NOISE)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> zipfile.ZipFile:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist"), cwd=tree)
    return zipfile.ZipFile(next((tree / "dist").glob("repkit-*.whl")))


@pytest.fixture(scope="module")
def site(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it lies after installation."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: zipfile.ZipFile, tree: Path) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == sources(tree)
    assert {name.partition("/")[0] for name in packed} == {"repkit"}
    assert "repkit/heads/ridge.py" in packed
    assert "repkit/py.typed" in packed
    assert "repkit/configs/sd15.json" in packed


def test_the_installed_package_is_whole(site: Path, tmp_path: Path) -> None:
    code = """if True:
        import repkit, repkit.heads.ridge
        print(repkit.__version__)
        print(repkit.heads.ridge.__file__)
        print(len(repkit.__path__))
        from repkit.recipes.reading import find_recipe
        print(find_recipe("probe"))"""
    version, ridge, entries, recipe = run(sys.executable, "-c", code, cwd=tmp_path, path=site).split()
    assert version == PROJECT["project"]["version"]
    assert Path(ridge) == site / "repkit" / "heads" / "ridge.py"
    assert entries == "1"
    assert Path(recipe) == site / "repkit" / "recipes" / "probe.yaml"


@pytest.mark.parametrize("origin", [ROOT, Path("/")], ids=["root", "elsewhere"])
def test_a_checkout_does_not_hide_hugging_faces_datasets(origin: Path) -> None:
    pytest.importorskip("datasets.arrow_dataset", exc_type=ImportError)
    code = """if True:
        import datasets, sys, repkit.heads.ridge
        for name in sys.argv[1:]:
            __import__(f"repkit.datasets.{name}")
        print(datasets.__file__, repkit.heads.ridge.__file__)"""
    ours = [path.stem for path in (ROOT / "datasets").glob("*.py")]
    theirs, ridge = run(sys.executable, "-c", code, *ours, cwd=origin, path=ROOT).split()
    assert "site-packages" in theirs and not theirs.startswith(f"{ROOT}/datasets")
    assert Path(ridge) == ROOT / "heads" / "ridge.py"


def test_pytest_sees_hugging_faces_datasets_too() -> None:
    assert str(ROOT) in sys.path  # pyproject's pythonpath: the case where a regular package here would win
    spec = importlib.util.find_spec("datasets")
    assert spec is not None and spec.origin is not None and spec.origin != str(ROOT / "datasets" / "__init__.py")


def test_every_folder_with_modules_is_a_package() -> None:
    homes = {Path(name).parent.as_posix().replace("/", ".") for name in sources(ROOT) if name.endswith(".py")}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(homes)


def requirements() -> list[Requirement]:
    """What the library and its extras need."""
    project = PROJECT["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def pins(name: str) -> dict[str, Version]:
    """The version of each package in a file of constraints."""
    pairs = [line.split("==") for line in (ROOT / name).read_text().splitlines()]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_the_pins_are_names_and_versions_only(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.]+", line)] == []
    assert len(pins(name)) == len(lines)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_every_dependency_is_pinned_within_its_range(name: str) -> None:
    pinned = pins(name)
    for requirement in requirements():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_oldest_pins_are_the_lower_bounds() -> None:
    pinned = pins("constraints-oldest.txt")
    for requirement in requirements():
        bound = next(Version(s.version) for s in requirement.specifier if s.operator == ">=")
        assert pinned[canonicalize_name(requirement.name)] == bound, requirement


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """What `make` reads before an environment exists."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-oldest.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("goal", ["demo", "test", "test-oldest", "test-all", "lint", "check", "bench"])
def test_every_goal_makes_its_environment_first(goal: str, bare: Path) -> None:
    commands = run("make", "-n", goal, cwd=bare).splitlines()
    installed = next(i for i, line in enumerate(commands) if "pip install" in line)
    used = next(
        i for i, line in enumerate(commands) if re.search(r"repkit demo|-m pytest|ruff check|benchmarks/", line)
    )
    assert installed < used


def test_make_names_the_remedy_where_no_python_is_found(bare: Path) -> None:
    done = subprocess.run(["make", "test", "PYTHON="], cwd=bare, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no Python 3.11 or newer" in done.stderr
    assert "make PYTHON=/path/to/python test" in done.stderr
