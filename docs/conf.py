# SPDX-License-Identifier: Apache-2.0
"""The documentation site. README.md is its start page, and the pages in its section "Documentation" are the menu.

    sphinx-build -W -b html -c docs . site

Sources are the Markdown files where they are in the repository, so that links between them work on a code host too.
"""

import re

from sphinx.application import Sphinx

project = "quantkit"
html_title = "quantkit"
author = "the quantkit authors"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "LOG.md", "docs/*.md", "interop/*.md", "calibration/README.md"]
exclude_patterns = [".*", "benchmarks", "outputs", "quantkit", "scripts", "site", "tests"]  # not to be walked through
html_theme = "furo"
html_extra_path = ["index.html"]  # the address of the folder itself leads to the start page
html_copy_source = False
html_use_index = False
html_show_copyright = False
myst_heading_anchors = 3  # as code hosts make them


def with_menu(app: Sphinx, name: str, source: list[str]) -> None:
    """Add to the start page the menu of its own links to pages."""
    if name == root_doc:
        section = source[0].partition("## Documentation\n")[2].partition("\n## ")[0]
        pages = re.findall(r"\]\(([\w/]+)\.md\)", section)
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", with_menu)
