"""The documentation as a site: built strictly, then read by a real Chromium, light and dark, wide and on a phone."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from browser import PHONE, chromium, width_of_content
from conftest import ROOT

pytestmark = [pytest.mark.xdist_group("browser")]
__all__ = ["chromium"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout; a link that leads nowhere, or a page that is in no menu, is an error."""
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not included in the" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site on this machine's loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pages(site: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(site)) for path in site.rglob("index.html"))


@pytest.mark.parametrize(
    ("scheme", "size"), [("light", PHONE), ("dark", {})], ids=["light phone", "dark desktop"]
)
def test_every_page_can_be_read(
    chromium: Any, site: Path, address: str, scheme: str, size: dict[str, Any]
) -> None:
    """Nothing on the console, nothing fetched from elsewhere, every image is there, no sideways scrolling."""
    context = chromium.new_context(color_scheme=scheme, **size)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "response",
        lambda answer: (
            said.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
        ),
    )
    page.on(
        "request",
        lambda one: (
            None if one.url.startswith((address, "data:", "blob:")) else said.append(one.url)
        ),
    )
    found = pages(site)
    assert len(found) > 20
    for name in found:
        page.goto(f"{address}/{name}/")
        assert said == [], name
        assert page.locator("h1").count() >= 1, name
        assert width_of_content(page) <= page.viewport_size["width"], name
        assert page.evaluate(
            "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        ), name
    context.close()


def test_a_reader_finds_a_key(chromium: Any, address: str) -> None:
    """By the site's own search, which needs no server."""
    page = chromium.new_page()
    page.goto(address)
    page.keyboard.press("/")
    page.keyboard.type("straggler_ratio")
    page.locator(".md-search-result__link").first.wait_for(timeout=20_000)
    found = page.locator(".md-search-result__link").all()
    assert any("/recipe/" in one.get_attribute("href") for one in found)
    page.close()
