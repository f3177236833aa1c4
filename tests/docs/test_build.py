"""The documentation builds without a warning, and its pages fetch nothing from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_pages_fetch_nothing(site):
    for page in site.rglob("*.html"):
        sources = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"|<link[^>]* href="([^"]*)"', page.read_text())
        assert not [s for pair in sources for s in pair if s.startswith(("http:", "https:", "//"))], page


def test_links_lead_to_files(site):
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#:?]+)(?:#[^"]*)?"', page.read_text()):
            if page.name != "404.html":  # its links are absolute
                assert (page.parent / link).exists(), f"{page.relative_to(site)} links to {link}"


def test_the_command_reference_has_every_option(site):
    from typer.main import get_command

    from rankopt.cli.main import app

    text = re.sub(r"<[^>]+>", "", (site / "reference" / "cli.html").read_text())
    for name, command in get_command(app).commands.items():
        assert f"rankopt {name}" in text
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(option in text for option in parameter.opts), parameter.opts
