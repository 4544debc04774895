"""The demo's page: self-contained HTML, every picture inside it."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

TEMPLATE = Path(__file__).parent / "demo.html"


@dataclass(frozen=True)
class Cell:
    """Validation accuracy in [0, 1] of one block at one time, for the trained network and for its untrained copy."""

    trained: float
    random: float
    chosen: bool = False


@dataclass(frozen=True)
class Table:
    """A model's cells, and the test accuracies of the cells that validation data chose."""

    model: str
    blocks: Sequence[str]
    times: Sequence[int]
    cells: Mapping[tuple[str, int], Cell]
    key: str
    trained: float
    interval: tuple[float, float]
    random: float
    random_key: str
    pixels: float


@dataclass(frozen=True)
class Neighbours:
    """A query with its class, and for each neighbour its picture, class and similarity."""

    query: Image.Image
    label: str
    found: Sequence[tuple[Image.Image, str, float]]


@dataclass(frozen=True)
class Verdict:
    """An image with its true class, and the posterior over classes, likeliest first."""

    image: Image.Image
    label: str
    posterior: Sequence[tuple[str | int | None, float]]


def write_page(
    path: Path,
    *,
    tables: Sequence[Table],
    neighbours: Sequence[Neighbours],
    verdicts: Sequence[Verdict],
    colors: Sequence[tuple[str, Sequence[Image.Image]]],
    facts: Mapping[str, str],
) -> Path:
    """Write the page to `path`; returns it."""
    filled = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        contests="".join(map(_contest, tables)),
        neighbours="".join(map(_neighbour_row, neighbours)),
        verdicts="".join(map(_verdict, verdicts)),
        colors="".join(_color_row(key, pictures) for key, pictures in colors),
        **{name: escape(value) for name, value in facts.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(filled, encoding="utf-8")
    return path


def _contest(table: Table) -> str:
    bars = (
        _bar(
            "trained",
            table.trained,
            "best",
            f"{table.key}; 95 % interval {table.interval[0]:.1%} to {table.interval[1]:.1%}",
        )
        + _bar("untrained", table.random, "control", table.random_key)
        + _bar("raw pixels", table.pixels, "control", "")
    )
    maps = _heat(table, "trained") + _heat(table, "random")
    return (
        f'<article><h3>{escape(table.model)}</h3><div class="bars">{bars}</div><div class="maps">{maps}</div></article>'
    )


def _bar(name: str, value: float, kind: str, note: str) -> str:
    return (
        f'<div class="bar"><span>{escape(name)}</span><i class="{kind}" style="--w:{value:.4f}"></i>'
        f"<b>{value:.1%}</b><small>{escape(note)}</small></div>"
    )


def _heat(table: Table, which: str) -> str:
    """One network's cells as an HTML table; both networks share one scale, so that colours compare."""
    values = [getattr(cell, side) for cell in table.cells.values() for side in ("trained", "random")]
    low, high = min(values), max(values)
    head = "".join(f"<th scope=col>{t}</th>" for t in table.times)
    rows = []
    for block in table.blocks:
        cells = []
        for t in table.times:
            cell = table.cells[block, t]
            value = getattr(cell, which)
            share = (value - low) / max(high - low, 1e-9)
            mark = ' class="chosen"' if cell.chosen and which == "trained" else ""
            cells.append(f'<td{mark} style="--v:{share:.3f}">{100 * value:.1f}</td>')
        rows.append(f"<tr><th scope=row>{escape(block)}</th>{''.join(cells)}</tr>")
    title = {"trained": "trained", "random": "same network, untrained"}[which]
    return f"<table><caption>{title}</caption><thead><tr><th>block \\ t</th>{head}</tr></thead>{''.join(rows)}</table>"


def _neighbour_row(row: Neighbours) -> str:
    found = "".join(
        f'<figure class="{"same" if label == row.label else "other"}">{_img(picture, label)}'
        f"<figcaption>{escape(label)}<br>{score:.3f}</figcaption></figure>"
        for picture, label, score in row.found
    )
    query = f"{_img(row.query, row.label)}<figcaption>{escape(row.label)}</figcaption>"
    return f'<div class="row"><figure class="query">{query}</figure>{found}</div>'


def _verdict(verdict: Verdict) -> str:
    right = verdict.posterior[0][0] == verdict.label
    bars = "".join(
        f'<div class="bar {"truth" if name == verdict.label else ""}"><span>{escape(str(name))}</span>'
        f'<i style="--w:{probability:.4f}"></i><b>{probability:.0%}</b></div>'
        for name, probability in verdict.posterior[:4]
    )
    caption = f"{escape(verdict.label)} {'&#10003;' if right else '&#10007;'}"
    figure = f"<figure>{_img(verdict.image, verdict.label)}<figcaption>{caption}</figcaption></figure>"
    kind = "right" if right else "wrong"
    return f'<article class="verdict {kind}">{figure}<div class="bars">{bars}</div></article>'


def _color_row(key: str, pictures: Sequence[Image.Image]) -> str:
    return f'<div class="row"><span class="key">{escape(key)}</span>{"".join(_img(one, key) for one in pictures)}</div>'


def _img(picture: Image.Image, alt: str) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG")
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
