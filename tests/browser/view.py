"""The dashboard in a page, by what it is called: roles, names and texts, as somebody without eyes finds them."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

FIRST_FRAME = 120_000  # ms: a kernel has to import torch and start servers, or join a swarm


class View:
    def __init__(self, page: Page) -> None:
        self.page = page
        self.root = page.get_by_role("region", name=re.compile("^labkit dashboard of swarm"))

    def expect_first_frame(self) -> None:
        expect(self.headline).to_contain_text(re.compile("[0-9] of 16 experts"), timeout=FIRST_FRAME)

    def region(self, name: str) -> Locator:
        return self.root.get_by_role("region", name=name, exact=True)

    def button(self, name: str) -> Locator:
        # The server's name is there for ears only, and chromium puts a space after it: "Really kill servers[2] ?".
        pattern = re.escape(name.removesuffix("?")) + (r" ?\?" if name.endswith("?") else "")
        return self.root.get_by_role("button", name=re.compile(f"^{pattern}$"))

    def slider(self, name: str) -> Locator:
        return self.root.get_by_role("slider", name=name, exact=True)

    @property
    def headline(self) -> Locator:
        return self.region("Headline")

    @property
    def status(self) -> Locator:
        return self.root.get_by_role("status").first

    @property
    def heat_map(self) -> Locator:
        return self.region("Routing").get_by_role("img").first

    @property
    def experts(self) -> Locator:
        """The rows of the table behind the heat map."""
        return self.root.get_by_role("table", name="Experts").locator("tbody").get_by_role("row")

    @property
    def servers(self) -> Locator:
        """The rows of the table of servers."""
        return self.root.get_by_role("table", name="Servers", exact=True).locator("tbody").get_by_role("row")

    def server(self, label: str) -> Locator:
        return self.servers.filter(has=self.page.get_by_role("rowheader", name=label)).first

    @property
    def happened(self) -> Locator:
        """What happened to servers, in words."""
        return self.region("Failures").get_by_role("list", name="What happened to servers")

    def number(self, pattern: str) -> int:
        """A number of the headline: group 1 of a pattern."""
        expect(self.headline).to_contain_text(re.compile(pattern))
        found = re.search(pattern, self.headline.text_content() or "")
        assert found is not None
        return int(found[1].replace(",", ""))

    def expect_step_beyond(self, step: int) -> None:
        expect(self.headline).to_contain_text(re.compile(r"step [0-9]"))
        expect(self.headline).not_to_contain_text(f"step {step:,} of")
        assert self.number(r"step ([\d,]+) of") > step

    def kill(self, label: str) -> None:
        """Press the button, and again when it asks."""
        self.button(f"Kill {label}").click()
        self.button(f"Really kill {label}?").click()
