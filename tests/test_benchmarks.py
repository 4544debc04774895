"""The scripts in benchmarks/ run, and what they write is a page of finite figures."""

import math
import re
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--batch", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def figures(page: Path, title: str) -> list[float]:
    """The numbers in the table cells of a section."""
    section = page.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = [cell for line in section.splitlines() if line.startswith("|") for cell in line.split("|")[2:-1]]
    return [float(number) for cell in cells for number in re.findall(r"nan|inf|\d+(?:\.\d+)?", cell)]


@pytest.mark.parametrize(
    ("script", "title", "options"), [("forward", "Forward", []), ("pipeline", "Pipeline", ["--images", "3"])]
)
def test_script_writes_finite_figures(tmp_path, capsys, script, title, options):
    page = tmp_path / "docs" / "page.md"
    import_module(script).main([*SMALL, *options, "--page", str(page)])
    found = figures(page, title)
    assert len(found) > 20 and all(math.isfinite(value) and value >= 0 for value in found)
    assert page.read_text().split(f"## {title}\n")[1].strip() == capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("script", "title", "options"),
    [
        ("matching", "Matching", ["--rounds", "1", "--shrink", "16", "--images", "3"]),
        ("correspondence", "Correspondence", ["--images", "1", "--repeats", "1", "--points", "3", "--sizes", "32"]),
    ],
)
def test_script_of_correspondence_writes_finite_figures(tmp_path, capsys, script, title, options):
    page = tmp_path / "page.md"
    import_module(script).main([*options, "--page", str(page)])
    found = figures(page, title)
    assert len(found) > 8 and all(math.isfinite(value) and value >= 0 for value in found)
    assert page.read_text().split(f"## {title}\n")[1].strip() in capsys.readouterr().out


def test_the_script_of_heads_writes_finite_figures(tmp_path):
    page = tmp_path / "page.md"
    small = "--train 5 --test 20 --seeds 1 --epochs 1 --width 8 --shots 1".split()
    import_module("head_ladder").main([*small, "--page", str(page)])
    found = figures(page, "Heads")
    assert len(found) > 20 and all(math.isfinite(value) and value >= 0 for value in found)


def test_the_script_of_sweeps_writes_finite_figures(tmp_path):
    page = tmp_path / "page.md"
    import_module("sweep").main(["--images", "5", "--rounds", "1", "--taps", "mid@10", "--page", str(page)])
    found = figures(page, "Sweep")
    assert found and all(math.isfinite(value) and value >= 0 for value in found)


def test_the_script_of_search_writes_finite_figures(tmp_path):
    page = tmp_path / "page.md"
    import_module("search_kinds").main(["--images", "60", "--views", "1", "--rounds", "1", "--page", str(page)])
    found = figures(page, "Search")
    assert len(found) > 60 and all(math.isfinite(value) and value >= 0 for value in found)


def test_the_script_of_best_cells_writes_a_section_and_a_picture(tmp_path, monkeypatch):
    page, script = tmp_path / "page.md", import_module("best_cells")
    monkeypatch.setattr(script, "TAPS", {"mini-unet": "mid@50"})
    monkeypatch.setattr(script, "POOLS", ("mean",))
    script.main(["--train", "16", "--test", "5", "--page", str(page)])
    section = page.read_text().split("## Sweep\n")[1]
    assert "160\ntraining and 50 test images" in section and "<- chosen" in section
    assert "nan" not in section and (tmp_path / "sweep-mini-unet.png").is_file()


def test_section_replaces_its_own_and_keeps_the_others(tmp_path):
    page, write = tmp_path / "page.md", import_module("measuring").write_section
    write(page, "B", "old\n\n### deeper\n\ntext")
    write(page, "A", "first")
    once = page.read_text()
    write(page, "B", "old\n\n### deeper\n\ntext")
    assert page.read_text() == once
    write(page, "B", "new")
    text = page.read_text()
    assert text.index("## A\n\nfirst") < text.index("## B\n\nnew") and "deeper" not in text


def test_turns_are_even_and_the_first_round_does_not_count():
    calls: list[str] = []
    actions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = import_module("measuring").take_turns(actions, 2)
    assert calls == [*"abc", *"cba", *"abc"] and {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys(
        "abc", 2
    )


@pytest.mark.parametrize(
    ("values", "low", "middle", "high"), [([2.0], 2, 2, 2), ([1.0, 2, 3, 4, 5], 2, 3, 4), ([5.0, 1, 4, 2, 3], 2, 3, 4)]
)
def test_spread_is_median_and_quartiles(values, low, middle, high):
    found = import_module("measuring").spread(values)
    assert (found.low, found.median, found.high) == (low, middle, high)
    assert f"{found:.1f}" == f"{middle:.1f} ({low:.1f} to {high:.1f})"


def test_ratio_is_taken_round_by_round():
    # Whole rounds that are slower by 1, 10 and 100 do not move it.
    assert import_module("measuring").ratio([2, 20, 200], [1, 10, 100]).high == 2
