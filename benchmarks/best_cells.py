"""Which block and time of the bundled models know most: `python benchmarks/best_cells.py` sweeps them.

On the bundled Fashion-MNIST images: every stage block at several times under two poolings, chosen on validation images,
tested once, beside the same network with random weights and raw pixels. The section `Sweep` of docs/RESULTS.md has what
`repkit sweep` prints, docs/sweep-MODEL.png its heat maps. `--train`, `--test` and `--models` make it smaller.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
from measuring import write_section

from repkit.datasets import fashion_mnist
from repkit.extractors import DiffusionExtractor
from repkit.listing import list_images
from repkit.tasks.sweep import Rules, sweep
from repkit.tasks.sweep_reading import Running
from repkit.tasks.sweep_report import CELLS, PICTURE, words
from repkit.zoo import load

ROOT = Path(__file__).parent.parent
TAPS = {"mini-unet": "down.*,mid,up.*@10,50,100,400", "mini-dit": "block.*@10,100,200,clean:100"}
POOLS, SHOTS = ("mean", "2x2"), (1, 5, 10)


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep, print, and write the section of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TAPS), choices=list(TAPS))
    parser.add_argument("--train", type=int, default=150, help="images a class to train and choose on, at most 400")
    parser.add_argument("--test", type=int, default=100, help="images a class, at most 1,000")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "RESULTS.md")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        for split, count in (("train", options.train), ("test", options.test)):
            fashion_mnist.write_folder(f"{folder}/images", split, count)
        told = [report(name, Path(folder), options.page.parent) for name in options.models]
    body = "\n\n".join([about(options.train, options.test), *told])
    print(body)
    write_section(options.page, "Sweep", body)


def report(name: str, folder: Path, pictures: Path) -> str:
    """What a sweep of a model prints, and its picture."""
    extractor = DiffusionExtractor(load(name), TAPS[name])
    rules = Rules(POOLS, few_shot=SHOTS)
    results = sweep(list_images(folder / "images"), extractor, folder / name, rules, running=Running(batch_size=50))
    picture = f"sweep-{name}.png"
    shutil.copyfile(folder / name / PICTURE, pictures / picture)
    return f"""### {name}

```
{words(pq.read_table(folder / name / CELLS), results)}
```

![accuracy by block and time of {name}]({picture})"""


def about(train: int, test: int) -> str:
    """What was done."""
    return f"""Made by `python benchmarks/best_cells.py`: `repkit sweep` of the bundled models on {10 * train:,}
training and {10 * test:,} test images of Fashion-MNIST, one forward for each image and time. The cell and its head are
chosen on validation images; the test images are read for that cell alone."""


if __name__ == "__main__":
    main()
