# SPDX-License-Identifier: Apache-2.0
"""What the site shows from outside of ``docs``: two pages, examples, and what was measured, with links to them."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["CONTRIBUTING.md", "CHANGELOG.md"]
MEASURED = "benchmarks/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    measured = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / MEASURED).iterdir())
    examples = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py"))
    for name in (*PAGES, *examples, *measured):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri.startswith(MEASURED):
        return re.sub(r"\]\(\.\./\.\./(?:docs/)?", "](../../", markdown)
    return re.sub(r"\]\((?:\.\./|docs/)", "](", markdown)
