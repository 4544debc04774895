"""What every test relies on: no network, no display, one thread, the same random numbers each time."""

import os
from collections.abc import Callable

# Before any import of huggingface_hub, matplotlib or numpy, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # on a busy machine two threads of a small product wait for each other

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("repkit", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repkit")


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator for tensors."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator for numpy arrays."""
    return np.random.default_rng(0)


@pytest.fixture
def repkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; its exit code, stdout and stderr."""
    from repkit import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capsys.readouterr()

    return run
