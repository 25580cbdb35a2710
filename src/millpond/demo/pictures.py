"""Pictures of the pages, taken with a real browser while the demo runs (they stand in the README)."""

from __future__ import annotations

import shutil
from pathlib import Path

from millpond import MillpondError
from millpond.demo.services import Site

_CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Camera:
    """Takes a page's picture when the stage at which it is worth seeing has ended."""

    def __init__(self, site: Site, directory: Path):
        self.site = site
        self.directory = directory
        self.browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if self.browser is None:
            raise MillpondError("Pictures need Chromium, and none is installed: apt-get install chromium.")
        directory.mkdir(parents=True, exist_ok=True)

    def take(self, stage: str) -> None:
        """Take the pictures that belong to the end of a stage."""
        if stage == "correct":
            self._page(f"{self.site.hub_url}/review", "review.png", login="reviewer")
        elif stage == "deliver_v2":
            self._page(f"{self.site.hub_url}/", "hub.png", login="operator")
            self._page(f"{self.site.edge_url}/", "edge.png", text="I expected little, and was moved to tears.")

    def _page(self, url: str, name: str, *, login: str = "", text: str = "") -> None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=self.browser, args=_CHROMIUM_OPTIONS)
            page = browser.new_page(viewport={"width": 1200, "height": 800})
            page.goto(url)
            if login and page.locator("input[name=token]").count():
                page.fill("input[name=token]", self.site.tokens[login])
                page.press("input[name=token]", "Enter")
                page.wait_for_load_state()
                page.goto(url)
            if text:
                page.fill("textarea", text)
                page.click("button[type=submit]")
            page.wait_for_load_state("networkidle")
            page.screenshot(path=self.directory / name)
            browser.close()
