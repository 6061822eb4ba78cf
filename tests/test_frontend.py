"""The front end: bundled in the package, small, asking nothing of a network, and in the wheel without its sources."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STATIC = ROOT / "labkit" / "view" / "static"
FRONTEND = ROOT / "labkit" / "view" / "frontend"
BUNDLES = ("dashboard.js", "dashboard.css", "replay.js")
NAMESPACES = {
    "http://www.w3.org/2000/svg",
    "http://www.w3.org/1999/xhtml",
    "http://www.w3.org/1999/xlink",
}  # not places


def test_the_widget_is_one_file_of_less_than_100_kb():
    assert 1_000 < (STATIC / "dashboard.js").stat().st_size < 100_000


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_names_no_other_machine(name):
    text = (STATIC / name).read_text()
    assert set(re.findall(r"(?:https?|wss?)://[^\s\"'`)]*", text)) <= NAMESPACES
    assert not re.search(r"""["'`(]//[a-z0-9-]+\.""", text)


@pytest.mark.parametrize("name", ["dashboard.js", "replay.js"])
def test_a_bundle_loads_nothing_and_evaluates_nothing(name):
    text = (STATIC / name).read_text()
    for word in ("fetch", "import", "importScripts", "eval", "Function", "require", "XMLHttpRequest", "WebSocket"):
        assert not re.search(rf"(?<![.\w$]){word}\s*\(", text), word
    assert "sourceMappingURL" not in text
    assert not re.search(r"""(?<![.\w$])(?:import|from)\s*["']""", text)


def test_the_style_sheet_loads_nothing():
    text = (STATIC / "dashboard.css").read_text()
    assert "@import" not in text
    assert all(target.startswith("data:") for target in re.findall(r"url\(\s*[\"']?([^)\"']*)", text))


def test_the_lock_file_pins_everything_and_names_no_registry():
    lock = json.loads((FRONTEND / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages
    assert all(entry.get("integrity", "").startswith("sha512-") for entry in packages.values())
    assert [name for name, entry in packages.items() if "resolved" in entry] == []
    wanted = json.loads((FRONTEND / "package.json").read_text())
    ranges = [*wanted.get("dependencies", {}).values(), *wanted["devDependencies"].values()]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in ranges)


def test_the_wheel_holds_every_module_and_the_bundles_and_not_their_sources():
    from hatchling.builders.wheel import WheelBuilder

    paths = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    files = {path for path in (ROOT / "labkit").rglob("*.py") if FRONTEND not in path.parents}
    assert {path.relative_to(ROOT).as_posix() for path in files} | {"labkit/swarm.py"} <= paths
    assert {f"labkit/view/static/{name}" for name in BUNDLES} <= paths
    assert [path for path in paths if "frontend" in path or "node_modules" in path] == []


def test_the_source_distribution_holds_what_the_tests_and_the_bundles_are_made_of():
    from hatchling.builders.sdist import SdistBuilder

    paths = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    sources = {"labkit/view/frontend/package-lock.json", "tests/conftest.py", "constraints.txt", "Makefile"}
    assert {f"labkit/view/static/{name}" for name in BUNDLES} | sources <= paths
    assert [path for path in paths if "node_modules" in path or "/shots/" in path] == []
