"""Rates of long work: of what is done since the first call, which comes before the work."""

import pytest

from repkit import progress


@pytest.mark.parametrize("earlier", [0, 60])
def test_the_rate_is_that_of_this_runs_own_work(earlier, monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with progress.Progress("classify") as tell:
        now = 200.0  # something else comes first
        tell(earlier, 100)
        now = 220.0
        tell(earlier + 10, 100)
        now = 280.0
        tell(100, 100, 3, "fine")
    rate = (100 - earlier) / 80
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [
        f"classify: {earlier + 10}/100, 0.5 images/s",
        f"classify: 100/100, {rate:.1f} images/s, 3 failed, fine",
    ]


def test_slow_work_has_a_rate(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with progress.Progress("probe", unit="epochs") as tell:
        tell(0, 5)
        now = 43.0
        tell(1, 5)
    assert capsys.readouterr().err.splitlines() == ["probe: 1/5, 0.023 epochs/s"]
