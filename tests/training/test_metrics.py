"""The file of a run's metrics, and its picture."""

from __future__ import annotations

import pytest
import torch

from muddformer.errors import InputError
from muddformer.plots import plot_losses
from muddformer.training.metrics import MetricsFile, Row, peak_memory_mib, read_metrics


def make_rows(steps, first=1):
    return [Row(n, 8 * n, 1 / n, 0.1 / n if n % 2 else None, 1e-3, 0.3, 10.0, 5.0) for n in range(first, steps + 1)]


def test_metrics_drop_what_the_resumed_run_repeats(tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    file.write(make_rows(6))
    file.close()
    assert read_metrics(path) == make_rows(6)
    with path.open("a") as torn:
        torn.write("7,56,0.14")
    assert read_metrics(path) == make_rows(6)
    file = MetricsFile(path, 4)
    file.write(make_rows(8, first=5))
    file.close()
    assert read_metrics(path) == make_rows(8)
    MetricsFile(path, 9).close()  # a lost row does not stop a run
    assert "lacks 1 of the rows of steps 1 to 9" in capsys.readouterr().err
    assert read_metrics(path) == make_rows(8)
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


def test_foreign_metrics_are_refused(tmp_path):
    path = tmp_path / "metrics.csv"
    for content in (None, b"", b"a,b\n1,2\n", b"\xff\xfe"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=r"metrics\.csv"):
            read_metrics(path)


def test_memory_and_picture(tmp_path):
    assert 10 < peak_memory_mib(torch.device("cpu")) < 1e6
    pytest.importorskip("matplotlib")
    plot_losses({"plain": [make_rows(9)] * 2, "MUDD": [make_rows(9)] * 2}, tmp_path / "losses.png", "title")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    plot_losses({name: [make_rows(9)] for name in "abcdef"}, tmp_path / "six.png", "title")
    with pytest.raises(ValueError, match="runs must hold at least one run of each model"):
        plot_losses({"plain": []}, tmp_path / "none.png", "title")
    with pytest.raises(ValueError, match=r"runs\['plain'\] must be evaluated at the same steps"):
        plot_losses({"plain": [make_rows(9), make_rows(12)]}, tmp_path / "none.png", "title")
