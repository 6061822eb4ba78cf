"""A notebook in JupyterLab, as somebody at the screen has it."""

from __future__ import annotations

from pathlib import Path

import nbformat
from playwright.sync_api import Page, expect

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}


def write_notebook(path: Path, cells: list[str]) -> None:
    notebook = nbformat.v4.new_notebook(
        metadata=KERNEL, cells=[nbformat.v4.new_code_cell(source.strip()) for source in cells]
    )
    nbformat.write(notebook, path)


class Notebook:
    """One that is open in a page."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        page.goto(url)
        self.expect_kernel()

    def expect_kernel(self) -> None:
        """Wait until the kernel has started and answers."""
        expect(self.page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible()

    def expect_cell(self, *, running: bool) -> None:
        """Wait until some cell runs, or none. (The status bar says Idle whenever a subshell has heard a click.)"""
        star = self.page.get_by_role("feed", name="Cells").get_by_text("[*]:")
        if running:
            expect(star).not_to_have_count(0)
        else:
            expect(star).to_have_count(0)

    def choose(self, menu: str, *items: str) -> None:
        """Choose from the menu bar."""
        self.page.get_by_role("menubar").get_by_role("menuitem", name=menu, exact=True).click()
        for item in items:
            self.page.get_by_role("menu").get_by_text(item, exact=True).click()  # what opens a submenu has no role

    def run_all(self) -> None:
        self.choose("Run", "Run All Cells")

    def run_in_last_cell(self, source: str) -> None:
        """Type into the last cell, which is empty, and run it."""
        cell = self.page.get_by_role("feed", name="Cells").get_by_role("textbox").last
        cell.click()
        self.page.keyboard.type(source)
        self.page.keyboard.press("Shift+Enter")

    def interrupt(self) -> None:
        self.choose("Kernel", "Interrupt Kernel")

    def restart(self) -> None:
        self.choose("Kernel", "Restart Kernel…")
        self.page.get_by_role("button", name="Confirm Kernel Restart").click()

    def save(self) -> None:
        with self.page.expect_response(lambda response: response.request.method == "PUT" and response.ok):
            self.choose("File", "Save Notebook")

    def reload(self) -> None:
        self.page.reload()
        self.expect_kernel()

    def set_theme(self, name: str) -> None:
        self.choose("Settings", "Theme", name)

    def shut_down(self) -> None:
        """Ends the kernel, and with it the swarm."""
        self.choose("Kernel", "Shut Down Kernel")
        expect(self.page.get_by_text("No Kernel")).not_to_have_count(0)
