"""Child processes that run Python: they import what this process can import, and nothing takes the place of a module.

A file `secrets.py` in the current folder must not keep labkit from starting servers, and an expert's class in that
folder must be found all the same. So a child has two search paths. While it imports labkit, the folder in which the
user works comes last; after that the path is the parent's own. In both, Python's library comes first, whose modules the
parent has mostly imported before the user's folder came into its path.

It imports nothing but the standard library, so that a child is quick to start.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from typing import Any

PATH_VARIABLE = "LABKIT_PATH"  # environment variable for a child: both search paths, and the file of our `labkit`
LABKIT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "__init__.py")
# From the very file, since a labkit in another folder of the path may come before it.
BOOT = f"""
import importlib.util, json, os, sys
sys.path[:], _, file = json.loads(os.environ[{PATH_VARIABLE!r}])
if os.path.isfile(file):
    spec = importlib.util.spec_from_file_location("labkit", file)
    sys.modules["labkit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["labkit"])
from labkit.launch.child_python import run_main
run_main()
"""

# A session of its own, so that Ctrl-C in a terminal and the kernel's stop button reach the parent only.
OWN_GROUP: dict[str, Any]
if sys.platform == "win32":
    OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
else:
    OWN_GROUP = {"start_new_session": True}


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that calls `main()` of a module of labkit in a new process, with `child_environment`.

    Args:
        module: Its dotted name.
        arguments: For `sys.argv`.
    """
    return [sys.executable, *_flags(), "-c", BOOT, module, *arguments]


def child_environment() -> dict[str, str]:
    """The environment of such a process: this one's, and where modules are found."""
    entries = importable(sys.path)
    return {**os.environ, PATH_VARIABLE: json.dumps([working_folder_last(entries), entries, LABKIT])}


def server_environment() -> dict[str, str]:
    """The environment of a server process: torch's threads sleep when idle, unless the user says otherwise.

    By default they spin for milliseconds after each operation, on cores that callers need. Asleep, they let two
    clients of one server make half as many calls of 2 MB again, on two cores, and the longest took a third of the time.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **child_environment()}


def child_folder() -> str | None:
    """The folder in which such a process begins: None for this one's, but where that is gone torch would not load."""
    try:
        os.getcwd()
    except OSError:
        return tempfile.gettempdir()
    return None


def run_main() -> None:
    """The child's side: import the module, give the user's own modules their place, and call `main()`."""
    module = sys.argv[1]
    del sys.argv[0]
    gc.disable()  # as in `labkit.quick_imports`
    main = importlib.import_module(module).main
    gc.enable()
    sys.path[:] = json.loads(os.environ.pop(PATH_VARIABLE))[1]
    sys.exit(main())


def importable(path: Iterable[object]) -> list[str]:
    """A search path as another process can use it, wherever that runs.

    Python's library comes first. Relative entries are made absolute, or left out if the current folder is gone. A
    `Path`, which Python's own import does not look at, but other importers do, comes last.
    """
    texts, others = list[str](), list[str]()
    for entry in path:
        if isinstance(entry, (str, bytes, os.PathLike)):
            (texts if isinstance(entry, str) else others).append(os.fsdecode(entry))
    found = []
    for text in (*texts, *others):
        try:
            found.append(os.path.abspath(text))
        except (OSError, ValueError):
            pass
    library = _library()
    return [*(entry for entry in found if entry in library), *(entry for entry in found if entry not in library)]


def working_folder_last(path: Iterable[str]) -> list[str]:
    """An absolute search path with the current folder, and that of the script that runs, at its end."""
    working = set()
    try:
        working.add(os.getcwd())
    except OSError:
        pass  # it is gone
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is not None:
        working.add(os.path.dirname(os.path.abspath(script)) if os.path.isabs(script) or working else script)
    entries = list(path)
    return [*(entry for entry in entries if entry not in working), *(entry for entry in entries if entry in working)]


def search_working_folder_last() -> None:
    """Let this process, which runs a command of labkit, find modules in the current folder, and there last of all."""
    entries = importable(sys.path)
    try:
        here = os.getcwd()
    except OSError:
        here = None  # it is gone
    sys.path[:] = [entry for entry in entries if entry != here] + ([] if here is None else [here])


def _library() -> set[str]:
    """Where Python's own library is."""
    folders = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    name = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    folders |= {os.path.join(folder, "lib-dynload") for folder in folders}
    return folders | {entry for entry in sys.path if isinstance(entry, str) and os.path.basename(entry) == name}


def _flags() -> list[str]:
    """The options of this process's Python that change what code means, and -P: no folder of its own in the path."""
    flags, given = ["-P"], sys.flags
    if given.isolated:
        flags.append("-I")
    for letter, number in (
        ("E", given.ignore_environment), ("s", given.no_user_site), ("S", given.no_site), ("O", given.optimize),
        ("B", given.dont_write_bytecode),
    ):  # fmt: skip
        flags += [f"-{letter}"] * int(number)
    if given.utf8_mode:
        flags += ["-X", "utf8"]
    return flags
