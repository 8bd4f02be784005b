"""Pictures and pages of runs; matplotlib is a requirement of these tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from ds_gradprune import cli
from ds_gradprune.commands import pictures
from ds_gradprune.commands import report as pages
from ds_gradprune.commands.plot import named
from ds_gradprune.commands.runlog import read_run
from ds_gradprune.errors import DataError, MissingDependencyError
from tests.helpers.fake_runs import write_dense_run, write_run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "DPI", 30)


def texts(axis: object) -> set[str]:
    """What a panel's legend says."""
    legend = axis.get_legend()
    return set() if legend is None else {text.get_text() for text in legend.get_texts()}


# --- plot -----------------------------------------------------------------------------------------


def test_a_run_gets_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "first")
    assert cli.main(["plot", str(folder)]) == 0
    assert (folder / "plot.png").read_bytes().startswith(PNG)
    assert capsys.readouterr().out.strip() == str(folder / "plot.png")


def test_panels_of_one_run(tmp_path: Path) -> None:
    figure = pictures.draw([read_run(write_run(tmp_path / "first", every=5))])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "own training loss; points: shared validation loss"
    assert titles[2:6] == [
        "density of an exchange",
        "link rate as the exchanges show it",
        "where the time goes",
        "totals",
    ]
    assert texts(figure.axes[2]) == {"sends more: room", "exchanges got faster or slower"}
    assert texts(figure.axes[4]) == {"computation", "codec", "wire, exposed", "wire, hidden"}
    assert figure.axes[6].get_ylabel() == "steps per exchange (dotted)"


def test_several_runs_overlay(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "islands")),
        read_run(write_dense_run(tmp_path / "alone")),
    ]
    figure = pictures.draw(runs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["islands", "alone"]
    assert figure.axes[4].get_title() == "time of a step"
    assert "undivided: DeepSpeed alone" in texts(figure.axes[5])
    assert "own training loss / training loss" in figure.axes[0].get_title()


def test_a_run_that_prunes_nothing_says_so(tmp_path: Path) -> None:
    figure = pictures.draw([read_run(write_dense_run(tmp_path / "alone", steps=1))])
    said = [text.get_text() for axis in figure.axes[2:4] for text in axis.texts]
    assert said == ["no run here prunes", "no rate was measured"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run", steps=3) for name in ("a", "b")]
    runs = named([read_run(folder) for folder in folders], folders)
    assert [run.name for run in runs] == ["a/run", "b/run"]


def test_smoothing_keeps_ends_and_length() -> None:
    assert pictures._smoothed([1.0, 2.0, 6.0], 1) == [1.0, 3.0, 6.0]
    assert pictures._smoothed([], 3) == []


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "first", steps=3))
    with pytest.raises(DataError, match="--out must be writable"):
        pictures.save([run], tmp_path / "nowhere" / "plot.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(write_run(tmp_path / "first", steps=3))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"ds_gradprune\[plot\]"):
        pictures.draw([run])


# --- report ---------------------------------------------------------------------------------------


def test_report_in_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "first")
    assert cli.main(["report", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "first: 200 steps, 119 s of training, 87.58 MB sent instead of 800.00"
    )
    assert "own training loss" in lines[0]
    assert lines[2].split()[:2] == ["step", "density"]
    assert len(lines) == 3 + 7


def test_report_as_one_page(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "islands<1>"), write_dense_run(tmp_path / "alone")]
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, folders), "--html", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "islands&lt;1&gt;" in text
    assert "islands<1>" not in text
    assert text.count('src="data:image/png;base64,') == 2
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "(own weights)" in text
    assert "the hosts are busy" in text


def test_very_many_decisions_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST_ROWS", 4)
    rows, left_out = pages.rows_of(read_run(write_run(tmp_path / "first")))
    assert (len(rows), left_out) == (4, 3)
    assert [row[0] for row in rows] == ["1", "20", "79", "200"]


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "first", steps=3)
    with pytest.raises(DataError, match="--html must be writable"):
        pages.main([str(folder), "--html", str(tmp_path / "nowhere" / "page.html")])
