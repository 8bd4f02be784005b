"""Tables that scripts write are in their documents, fresh."""

from __future__ import annotations

import pytest

from docs import config_table, control_table, ethernet_table
from docs.marked_table import MarkedTable, markdown, run
from ds_gradprune.config import GradientPruningConfig
from tests.helpers.documents import read

TABLES = [*config_table.TABLES, *control_table.TABLES, *ethernet_table.TABLES]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_table_is_fresh(table: MarkedTable) -> None:
    text = read(table.path)
    assert table.into(text) == text, f"run: python {table.script} --write"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_table_needs_its_markers(table: MarkedTable) -> None:
    with pytest.raises(ValueError, match="must hold the lines"):
        table.into("# no marker\n")


def test_config_table_has_a_row_for_every_key() -> None:
    rows = config_table.table().splitlines()[2:]
    models = [model for _, model in config_table.sections(GradientPruningConfig)]
    assert len(rows) == sum(len(model.model_fields) for model in models)
    assert all(row.count(" | ") == 3 and "None" not in row for row in rows)


def test_config_table_names_the_path_of_a_key() -> None:
    prefixes = [prefix for prefix, _ in config_table.sections(GradientPruningConfig)]
    assert prefixes[0] == ""
    assert {"density.", "throttle.", "throttle.schedule[]."} <= set(prefixes)


@pytest.mark.parametrize(
    ("pinned", "adaptive", "expected"),
    [
        (0.2, 0.3, "yes"),
        (0.2, 0.8, "yes"),
        (0.2, 0.81, "yes, pin the density"),
        (0.2, None, "yes, pin the density"),
        (None, 0.5, "yes"),
        (0.9, 1.2, "no"),
        (None, None, "no"),
    ],
)
def test_verdict_follows_the_measured_shares(
    pinned: float | None, adaptive: float | None, expected: str
) -> None:
    assert ethernet_table.verdict(pinned, adaptive) == expected


def test_shares_are_those_of_the_results() -> None:
    """By hand from the page: 163.8 of 1102.5 s at 20 Mbit/s, 32.9 of 45.1 s at 1 Gbit/s."""
    rows = ethernet_table.pays().splitlines()
    assert rows[2].endswith("| yes | 0.15 | 0.15 |")
    assert rows[4].endswith("| yes, pin the density | 0.73 | 0.92 |")


def test_span_tells_one_figure_or_two() -> None:
    assert ethernet_table.span([3.0, 1.0, 2.0], ".0f") == "1 to 3"
    assert ethernet_table.span([1.02, 1.0, 1.01], ".2f", alike=1.05) == "1.01"


def test_markdown_aligns_text_and_numbers() -> None:
    assert markdown(["a", "b"], [["x", "1"]]).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x | 1 |",
    ]


def test_script_takes_nothing_else() -> None:
    with pytest.raises(SystemExit, match="takes nothing or --write"):
        run([], ["--wrote"])
