"""Make the repository's own pages part of the site: README as its front page, CONTRIBUTING and CHANGELOG beside it.

The Markdown files link to each other as they lie in the repository, so that they read well on a forge. MkDocs knows
docs/ alone; this adds the others and moves their links. Used by mkdocs.yml.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPO = Path(__file__).parents[1]
# path in the repository -> path on the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/README.md": "pages.md",
}
FILES = ("LICENSE", "CITATION.cff")
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of docs/; docs/README.md makes way for the front page."""
    files.remove(files.src_uris["README.md"])
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(REPO / source).read_text()))
    for source in FILES:
        files.append(File.generated(config, source, abs_src_path=str(REPO / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Move a page's links from the repository's folders to the site's."""
    here = next((path for path, uri in PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}")
    return LINK.sub(lambda found: found[1] + _on_site(found[2], posixpath.dirname(here), page.file.src_uri), markdown)


def _on_site(link: str, folder: str, page: str) -> str:
    path = posixpath.normpath(posixpath.join(folder, link))
    return posixpath.relpath(PAGES.get(path, path.removeprefix("docs/")), posixpath.dirname(page) or ".")
