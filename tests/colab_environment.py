"""Makes the environment of Colab's kernels, for tests: `python -m tests.colab_environment PATH`.

Colab has ipywidgets 7 and ipykernel 6, without subshells. What differs is installed into a small virtual environment;
everything else, torch above all, is taken from the environment that runs this. It is done when the file `ready` is
there, which says what was installed; then this does nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

# What Colab has, and what these need that the main environment has not, or has too new.
PINS = (
    "ipywidgets==7.7.1",
    "ipykernel==6.17.1",
    "ipython==7.34.0",
    "anywidget==0.9.18",  # the oldest that labkit takes
    "jupyter-client==7.4.9",
    "traitlets==5.7.1",
    "widgetsnbextension==3.6.10",
    "jupyterlab-widgets==1.1.11",
    "ipython-genutils==0.2.0",
    "nest-asyncio==1.6.0",
    "entrypoints==0.4",
    "backcall==0.2.0",
    "pickleshare==0.7.5",
    "decorator==4.4.2",
)


def interpreter(folder: Path) -> Path:
    """The Python of this environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def make(folder: Path) -> None:
    """Make it, unless it is there as it should be."""
    main = sysconfig.get_path("purelib")
    ready, wanted = folder / "ready", "\n".join([sys.version, main, *PINS, ""])
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        ready.touch()  # for make, which looks at times
        return
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=sys.platform != "win32")
    python = interpreter(folder)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--disable-pip-version-check", *PINS], check=True)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    # `addsitedir` puts it behind what is installed here, and reads the .pth files in it too (labkit's own is one).
    Path(own, "main_environment.pth").write_text(f"import site; site.addsitedir({main!r})\n", encoding="utf-8")
    ready.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
