"""Pages as a parser and a browser see them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

PHONE = 390


class Page(HTMLParser):
    """What a page would load or run, its ids, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def chromium(tmp_path: Path) -> Any:
    """Runs headless Chromium on a file and returns what it prints."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail(
            "the browser tests need Chromium: install it (Debian: apt-get install chromium) and run the tests again"
        )
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "extensions"]
    command = [found, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"]
    command += [f"--disable-{x}" for x in quiet] + [f"--user-data-dir={tmp_path / 'browser'}"]

    def browse(path: Path, *options: str) -> str:
        done = subprocess.run([*command, *options, path.as_uri()], capture_output=True, timeout=1200, check=True)
        return done.stdout.decode()

    return browse


def measure(page: str, width: int, folder: Path) -> Path:
    """A file that shows a page in a frame of a width (a window is at least 500 wide) and notes what it finds."""
    without_policy = re.sub(r"<meta http-equiv=.Content-Security-Policy.*?>", "", page)
    script = """
      const frame = document.querySelector("iframe");
      frame.onload = () => {
        const d = frame.contentDocument, w = frame.contentWindow, width = d.documentElement.clientWidth;
        const out = [...d.querySelectorAll("h1, h2, p, table, figure, svg, pre")].filter(
          e => !e.closest(".wide, .scroll") && e.getBoundingClientRect().right > width + 1);
        const size = Math.min(...[...d.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height));
        document.title = JSON.stringify({ scroll: d.documentElement.scrollWidth, inner: w.innerWidth, smallest: size,
          rows: d.querySelectorAll(".layers tbody tr.layer").length, out: out.map(e => e.outerHTML.slice(0, 200)) });
      };
      frame.srcdoc = SOURCE;
    """
    source = json.dumps(without_policy).replace("</", "<\\/").replace("<!--", "<\\!--")
    path = folder / "frame.html"
    frame = f"<iframe style='width:{width}px;height:900px;border:0'></iframe>"
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title></title>{frame}<script>{script.replace('SOURCE', source)}</script>"
    )
    return path
