"""README and pages, and the snippets that they show."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *SITE)


def blocks(page: Path, language: str) -> list[str]:
    """Content of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def snippets(language: str) -> list[tuple[str, str]]:
    """Fenced blocks of a language: the page's name and the content."""
    return [(page.name, block) for page in PAGES for block in blocks(page, language)]
