"""The README against the project: table, file map, names, versions and commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import config_table, control_table, ethernet_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(begin: str, end: str) -> str:
    return README.split(begin, 1)[1].split(end, 1)[0]


def commands() -> list[str]:
    """The lines of all code blocks, continued lines joined."""
    blocks = re.findall(r"^```(?:\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def test_config_table_is_the_one_of_the_models() -> None:
    fresh = config_table.TABLE.into(README)
    assert fresh == README, "run: python docs/config_table.py --write"


@pytest.mark.skipif(not control_table.RESULTS.exists(), reason="no results of control.py here")
def test_control_table_is_the_one_of_the_results() -> None:
    fresh = control_table.TABLE.into(README)
    assert fresh == README, "run: python docs/control_table.py --write"


def test_ethernet_table_is_the_one_of_the_results() -> None:
    fresh = ethernet_table.TABLE.into(README)
    assert fresh == README, "run: python docs/ethernet_table.py --write"


def test_config_table_has_a_row_for_every_key() -> None:
    rows = config_table.table().splitlines()[2:]
    expected = sum(len(model.model_fields) for _, model in config_table.SECTIONS)
    assert len(rows) == expected
    assert all(row.count(" | ") == 3 and "None" not in row for row in rows)


def test_config_table_needs_its_markers() -> None:
    with pytest.raises(ValueError, match="must hold the lines"):
        config_table.TABLE.into("# no marker\n")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_explained(path: Path) -> None:
    assert f"| `{path.name}` |" in README


def test_every_named_configuration_is_shipped() -> None:
    named = set(re.findall(r"ds_configs/(\w+\.json)", README)) | set(
        re.findall(r"^\| `(\w+\.json)`", README, flags=re.MULTILINE)
    )
    assert named == {path.name for path in (ROOT / "ds_configs").glob("*.json")}


def test_file_map_holds_every_module() -> None:
    listed = between("## Files", "## Limits")
    package = ROOT / "ds_gradprune"
    modules = [p.name for p in package.glob("*.py") if p.name != "__init__.py"]
    folders = [f"{p.parent.name}/" for p in package.glob("*/__init__.py")]
    missing = [name for name in [*modules, *folders] if name not in listed]
    assert missing == []


def test_file_map_holds_nothing_else() -> None:
    listed = between("## Files", "## Limits")
    for name in set(re.findall(r"[\w.]+\.(?:py|sh)", listed)):
        assert list(ROOT.glob(f"*/{name}")), f"{name} is in the file map, but not there"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:launch|docs)/\w+\.\w+", README))))
def test_every_named_script_exists(path: str) -> None:
    assert (ROOT / path).is_file()


def test_versions_are_the_pinned_ones() -> None:
    tested = between("<!-- tested versions: checked against constraints.txt -->", "<!--")
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    named = dict(re.findall(r"([a-z]\w+) (\d[\d.]*\d)", tested.replace("CPython 3.11", "")))
    assert len(named) >= 5
    assert named == {name: pins[name] for name in named}


def test_constraints_pin_no_local_build_and_no_host() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), pins


def test_flags_in_the_commands_exist() -> None:
    checked = 0
    for command in commands():
        for name in re.findall(r"launch/(\w+\.py) ", command):
            script = (ROOT / "launch" / name).read_text(encoding="utf-8")
            arguments = command.split(f"launch/{name} ", 1)[1]
            for flag in re.findall(r"--[a-z_-]+", arguments):
                assert f'"{flag}"' in script, f"launch/{name} has no {flag}"
                checked += 1
    assert checked >= 8, "no command was found"
