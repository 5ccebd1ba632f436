"""The tables of README.md and docs/: they are what benchmarks/results gives, and ratios are fair or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from helpers.programs import BENCHMARKS, programs


@pytest.fixture
def report() -> Iterator[ModuleType]:
    with programs(BENCHMARKS, "report") as modules:
        yield modules.report


def test_the_pages_are_what_the_csv_files_give(report: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def step(method: str, ms: float, gib: float = 10.0, commit: str = "aaaaaaa") -> dict[str, str]:
    """A row of train_step.py."""
    figures = {"ms": ms, "peak_gib": gib, "first_step_s": 30.0, "bytes_rmw_ms": 5.0, "bytes_deferred_ms": 4.0}
    where = {
        "device": "GPU",
        "torch": "2",
        "cuda": "13",
        "commit": commit,
        "date": "2026-01-01",
        "csv": "h100_train_step",
    }
    names = {"model": "24x1024", "method": method, "batch": "8", "length": "2048", "status": "ok"}
    return {**names, **{name: str(value) for name, value in figures.items()}, **where}


def cells(report: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]]) -> list[str]:
    """Those of the one line of the table of training steps."""
    monkeypatch.setattr(report, "read_gpus", lambda subject: rows)
    (line,) = [line for line in report.steps(["compile"], short=True).splitlines() if line.startswith("| 24 x 1024")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_to_the_faster_twin_of_the_run(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [step("plain-compile", 100, 12), step("plain16-compile", 90, 10), step("mudd-compile", 120, 11)]
    assert cells(report, monkeypatch, rows)[5:] == ["0.750", "1.100", "aaaaaaa"]
    rows = [step("plain-compile", 80, 12), step("plain16-compile", 90, 10), step("mudd-compile", 120, 12)]
    assert cells(report, monkeypatch, rows)[5:7] == ["0.667", "1.000"]


@pytest.mark.parametrize(
    "rows",
    [
        [step("plain-compile", 100), step("mudd-compile", 120)],
        [step("plain16-compile", 90), step("mudd-compile", 120)],
        [step("plain-compile", 100), step("plain16-compile", 90, commit="bbbbbbb"), step("mudd-compile", 120)],
        [step("plain-compile", 100), step("plain16-eager", 90), step("mudd-compile", 120)],
        [
            step("plain-compile", 100),
            {**step("plain16-compile", 0), "status": "out of memory"},
            step("mudd-compile", 120),
        ],
    ],
)
def test_without_both_twins_in_the_run_there_is_no_ratio(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]]
) -> None:
    monkeypatch.setattr(report, "read_gpus", lambda subject: rows)
    (line,) = [line for line in report.steps(["compile"]).splitlines() if line.startswith("| 24 x 1024")]
    assert line.split(" | ")[6:8] == ["-", "-"]
    assert report.steps(["compile"], short=True) == "(not measured)\n"  # the README has whole comparisons alone


def test_the_short_table_has_24_layers_and_more(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [step("plain-compile", 100), step("plain16-compile", 90), step("mudd-compile", 120)]
    small = [{**row, "model": "12x1024"} for row in rows]
    monkeypatch.setattr(report, "read_gpus", lambda subject: rows + small)
    assert report.steps(["compile"]).count("| MUDD |") == 2
    assert report.steps(["compile"], short=True).count("| MUDD |") == 1


def test_a_later_run_with_one_twin_does_not_replace_one_with_both(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [step("plain-compile", 100), step("plain16-compile", 90), step("mudd-compile", 120)]
    later = [step("plain-compile", 99, commit="bbbbbbb"), step("mudd-compile", 110, commit="bbbbbbb")]
    assert cells(report, monkeypatch, whole + later)[-1] == "aaaaaaa"
    later.insert(1, step("plain16-compile", 88, commit="bbbbbbb"))
    assert cells(report, monkeypatch, whole + later)[5:] == ["0.800", "1.000", "bbbbbbb"]


def test_a_page_that_is_out_of_date(report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: demo -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(report, "pages", lambda: [page])
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--check"]) == 1
    assert "old" in page.read_text()
    assert report.main([]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| plain |" in text and "old" not in text
    assert report.main(["--check"]) == 0


def test_an_unknown_table_is_named(report: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no table 'speeed'"):
        report.filled("<!-- table: speeed -->\n<!-- end -->", Path("page.md"))
