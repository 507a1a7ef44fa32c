"""A real browser on the page, in both of its homes, with everything it complained about or asked for."""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
AXE = Path(__file__).resolve().parents[1] / "web" / "node_modules" / "axe-core" / "axe.min.js"
SERIOUS = ("serious", "critical")
# axe's rules that look at colours, of those that it has switched on
OF_COLORS = ("color-contrast", "link-in-text-block")
# Another view of the page that is open. The page's own listener is older, so when ours is called, the new view is there or is
# being loaded.
MOVE = """hash => new Promise(done => {
    if (location.hash === hash) return done();
    addEventListener("hashchange", () => setTimeout(done), {once: true});
    location.hash = hash;
})"""


@contextmanager
def open_browser() -> Iterator[Any]:
    """Chromium; the test is skipped, with the reason, where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; test_report.py parses the page without one")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


class Tab:
    """One tab. `home` is the page's address without what follows the `#`."""

    def __init__(self, browser: Any, home: str, scheme: str = "light", width: int = 1280, height: int = 720) -> None:
        size = {"width": width, "height": height}
        # Served, the policy forbids what axe puts into the page; the page itself is looked at under its policy first.
        self.page = browser.new_page(viewport=size, color_scheme=scheme, accept_downloads=True)
        self.page.set_default_timeout(30_000)
        self.home = home
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        self.page.on("request", self._note_request)

    def _note_request(self, request: Any) -> None:
        url = request.url.partition("#")[0]
        own = self.home.rpartition("/")[0] if self.home.startswith("http") else self.home
        if not url.startswith((own, "data:", "blob:")):
            self.foreign.append(url)

    def open(self, address: str = "overview") -> Any:
        """A view by its address; waits until it has its heading and nothing loads any more. The page itself is loaded once."""
        if self.page.url.partition("#")[0] == self.home:
            self.page.evaluate(MOVE, f"#/{address}")
        else:
            self.page.goto(f"{self.home}#/{address}")
        self.settle()
        return self.page

    def settle(self) -> None:
        """Wait until the view stands."""
        self.page.wait_for_selector("main h1")
        self.until("!document.querySelector('main').innerText.includes('Loading …')")

    def until(self, expression: str, seconds: float = 30) -> None:
        """Wait until something is true in the page. (Playwright's own way has the page evaluate text, which its policy forbids.)"""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"{expression}\n{self.page.inner_text('main')[:2000]}"
            time.sleep(0.05)

    def until_text(self, pattern: str, seconds: float = 30) -> str:
        """Wait until the view's text matches; returns the text."""
        end = time.monotonic() + seconds
        while not re.search(pattern, text := self.page.inner_text("main")):
            assert time.monotonic() < end, f"{pattern}\n{text[:2000]}"
            time.sleep(0.05)
        return text

    def require_fit(self) -> None:
        """No scrolling sideways."""
        wide = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{self.page.url} is {wide} pixels too wide"

    def require_accessible(self, rules: Sequence[str] = ()) -> None:
        """axe-core finds no serious violation, of these rules or of all that it has switched on."""
        if not AXE.is_file():
            pytest.skip("axe-core is not installed: `make page` installs it")
        if self.page.evaluate("typeof axe") == "undefined":
            self.page.evaluate(AXE.read_text(encoding="utf-8"))
        options = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
        found = self.page.evaluate("options => axe.run(document, options)", options)
        wrong = [
            f"{v['id']}: {node['html'][:200]} ({node['failureSummary'][:200]})"
            for v in found["violations"]
            if v["impact"] in SERIOUS
            for node in v["nodes"][:3]
        ]
        assert not wrong, f"{self.page.url}: " + "; ".join(wrong)

    def close(self) -> None:
        """Leave, requiring that nothing went wrong and nothing foreign was asked for."""
        self.page.close()
        assert not self.complaints, self.complaints
        assert not self.foreign, self.foreign


@contextmanager
def tab(browser: Any, home: str, **options: Any) -> Iterator[Tab]:
    """A tab that is closed, and judged, at the end."""
    opened = Tab(browser, home, **options)
    try:
        yield opened
    except BaseException:
        opened.page.close()
        raise
    opened.close()
