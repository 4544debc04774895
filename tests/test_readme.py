"""What the README shows runs: its Python block, and its command lines, on a folder as it describes them."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from repkit.cli import main
from repkit.datasets import fashion_mnist

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `photos`: a tree of classes, and the two files that the examples name."""
    fashion_mnist.write_folder(tmp_path / "tree", "test", 4)
    (tmp_path / "tree" / "test").rename(tmp_path / "photos")
    Image.linear_gradient("L").save(tmp_path / "photos" / "bag" / "a.png")
    Image.radial_gradient("L").save(tmp_path / "photos" / "bag" / "b.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def block(language: str, heading: str) -> str:
    section = README.split(f"## {heading}\n")[1]
    found = re.search(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    assert found, heading
    return found[1].replace("photos/a.png", "photos/bag/a.png").replace("photos/b.png", "photos/bag/b.png")


def test_the_python_example_runs_and_its_shapes_are_the_stated_ones(folder: Path) -> None:
    scope: dict[str, object] = {}
    exec(block("python", "In Python"), scope)
    assert scope["features"]["up.0@100"].shape == (2, 128, 16, 16)  # type: ignore[index]
    assert scope["store"].array("mid@50").shape == (42, 512)  # type: ignore[attr-defined]


def test_the_command_lines_run_in_their_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [shlex.split(line, comments=True) for line in block("bash", "On the command line").splitlines()]
    assert len(lines) == 8
    outputs = {}
    for line in lines:
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, line
        outputs[line[1]] = capsys.readouterr().out.splitlines()
    assert (folder / "features.png").is_file() and (folder / "features-confusion.png").is_file()
    # The image that was asked for is in the index, so it is its own nearest neighbour.
    assert outputs["search"][0].split()[1] == "bag/a.png"
    assert len(outputs["classify"]) == 1 and outputs["classify"][0].startswith("a.png")


def test_both_commands_of_the_readme_are_goals_of_the_makefile() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for goal in ("demo", "test", "test-all", "check", "bench"):
        assert f"make {goal}" in README and re.search(rf"^{goal}:", makefile, flags=re.MULTILINE), goal
