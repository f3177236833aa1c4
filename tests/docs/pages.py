"""The README and the pages of docs/, and the code blocks in them."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.helpers import ROOT

LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)")
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)

PATHS = {
    str(p.relative_to(ROOT)): p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
}
PAGES = {name: path.read_text() for name, path in sorted(PATHS.items())}
README = PAGES["README.md"]


class Block(NamedTuple):
    """A fenced block. info: what follows the language: a title marks what is shown only."""

    language: str
    info: str
    code: str


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in some languages."""
    return [b for b in (Block(*match) for match in FENCE.findall(PAGES[page])) if b.language in languages]
