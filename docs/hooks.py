"""MkDocs hooks: the command-line reference, the contributing page, and links to files outside docs/.

Pages link to the repository's other files as they lie (`../studies/results/bits.md`), so that the links work where the
Markdown is read in the repository. The build copies every file that is linked to into the site, under its own path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
COMMANDS = "<!-- commands -->"
CONTRIBUTING = "contributing.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page links to, and those that these link to in turn."""
    waiting = [(f"docs/{f.src_uri}", _source(f.src_uri)) for f in files.documentation_pages()]
    seen = {path for path, _ in waiting}
    while waiting:
        path, text = waiting.pop()
        for target in sorted(set(_targets(path, text))):
            if target in seen or target.startswith("docs/") or not (ROOT / target).is_file():
                continue
            seen.add(target)
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
            if target.endswith(".md"):
                waiting.append((target, (ROOT / target).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in what is generated, and point links at the places of files in the site."""
    uri = page.file.src_uri
    path = f"docs/{uri}"
    if uri == CONTRIBUTING:
        markdown, path = _source(uri), CONTRIBUTING.upper().replace(".MD", ".md")
    elif page.file.generated_by:
        path = uri  # one of the repository's other files
    markdown = LINK.sub(lambda match: match[1] + _in_site(match[2], path, uri) + match[3], markdown)
    return markdown.replace(COMMANDS, command_reference()) if COMMANDS in markdown else markdown


def _source(uri: str) -> str:
    """The Markdown of a page under docs/; the contributing page shows the repository's CONTRIBUTING.md."""
    return (ROOT / ("CONTRIBUTING.md" if uri == CONTRIBUTING else f"docs/{uri}")).read_text()


def _targets(path: str, text: str) -> list[str]:
    """The repository paths that a file links to."""
    base = "" if path == f"docs/{CONTRIBUTING}" else posixpath.dirname(path)
    return [posixpath.normpath(posixpath.join(base, match[2])) for match in LINK.finditer(text)]


def _in_site(link: str, path: str, uri: str) -> str:
    """A link of the file at `path` in the repository, as the page at `uri` of the site has to write it."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if not (ROOT / target).is_file():
        return link
    return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(uri) or ".")


# --- the command line ------------------------------------------------------------------------------


def command_reference() -> str:
    """Every command of `rankopt` with its arguments and options, from the Typer application."""
    from typer.main import get_command

    from rankopt.cli.main import app

    commands = dict(sorted(get_command(app).commands.items()))  # type: ignore[attr-defined]
    return "\n\n".join(_command(name, command) for name, command in commands.items())


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["rankopt", name, *(p.name.upper() for p in arguments), "[OPTIONS]"])
    parts = [f"## rankopt {name}", command.help, f"```console\n$ {usage}\n```"]
    rows = [(f"`{p.name.upper()}`", p) for p in arguments] + [(_flags(p), p) for p in options]
    table = ["| argument or option | what it does | default |", "|---|---|---|"]
    table += [f"| {left} | {_cell(p.help or '')} | {_default(p)} |" for left, p in rows]
    return "\n\n".join([*parts, "\n".join(table)])


def _flags(option: Any) -> str:
    """`--workers N`, or both names of a switch."""
    from rankopt.cli.parameters import placeholder

    value = placeholder(option).replace("|", "\\|")
    return " / ".join(f"`{name} {value}`".replace(" `", "`") for name in [*option.opts, *option.secondary_opts])


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if isinstance(getattr(parameter, "show_default", None), str):
        return _cell(parameter.show_default)  # in words
    if value is None or value is False or value == [] or value == float("inf"):
        return ""
    return f"`{str(value).lower() if value is True else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[")
