"""Measurements of the search for experts, kept in a file: what is there already is not measured again.

Each is made in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from labkit.experiments.expert_search import SearchConfig, measure
from labkit.experiments.parent import end_with_parent


def measure_all(configs: Sequence[SearchConfig], path: Path) -> list[dict[str, Any]]:
    """What `measure` returns for each. A line of the file `path` for each is what is there already; it grows by the
    others. Raises `RuntimeError` if one fails."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = [json.loads(line) for line in lines]
    results = []
    for config in configs:
        fields = json.loads(json.dumps(asdict(config)))
        found = next((result for result in known if fields.items() <= result.items()), None)
        if found is None:
            found = _measure_alone(fields)
            with path.open("a") as file:
                print(json.dumps(found), file=file)
        results.append(found)
    return results


def _measure_alone(fields: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "labkit.experiments.search_results", json.dumps(fields)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            said = child.stdout.read()
            child.wait()
        except BaseException:
            child.kill()
            raise
    if not said:
        raise RuntimeError(f"the measurement of {fields} failed with exit code {child.returncode}")
    found: dict[str, Any] = json.loads(said)
    return found


def main() -> None:
    """The child's part: `python -m labkit.experiments.search_results CONFIG`."""
    end_with_parent()
    fields = json.loads(sys.argv[1])
    print(json.dumps(measure(SearchConfig(**fields | {"grid": tuple(fields["grid"])}))))


if __name__ == "__main__":
    main()
