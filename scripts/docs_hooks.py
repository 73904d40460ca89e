"""What MkDocs does beside its own: pages that are made from the repository's other files when the site is built.

MkDocs calls the functions by their names (`hooks` in mkdocs.yml). Nothing of torch is imported.
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from maiht_lightning.command_line.catalog import command_help, group_help  # noqa: E402

# Lines of the help are no longer than a narrow page shows.
COLUMNS = 80


def contributing() -> str:
    """CONTRIBUTING.md as a page of the site, with links as they are from `docs/`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.replace("](README.md)", "](index.md)").replace("](docs/", "](")


def with_help(text: str) -> str:
    """Put the help of a command where a page has `<!-- help COMMAND -->`, and of all where it has `<!-- help -->`."""

    def help_of(match: re.Match[str]) -> str:
        shown = command_help(match[1], COLUMNS) if match[1] else group_help()
        return f"```text\n{shown}\n```"

    return re.sub(r"<!-- help ?(\w*) -->", help_of, text)


def with_files(text: str) -> str:
    """Show a file of `docs/` where a page has `<!-- file PATH -->`, so that it is written once."""

    def content_of(match: re.Match[str]) -> str:
        content = (ROOT / "docs" / match[1]).read_text(encoding="utf-8").rstrip()
        return f"```{Path(match[1]).suffix[1:]}\n{content}\n```"

    return re.sub(r"<!-- file (\S+) -->", content_of, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie elsewhere in the repository."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "contributing.md", content=contributing()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is made from the code and from other files."""
    return with_files(with_help(markdown))
