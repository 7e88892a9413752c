"""Sphinx: `make docs` builds docs/_build/html, and stops at every dead link or unknown name."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

REPOSITORY = "https://github.com/moetuner/moetuner"

project = "moetuner"
author = "the moetuner authors"
version = release = version_of("moetuner")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.autosummary",
    "commands",
]
html_theme = "furo"
html_title = f"moetuner {version}"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_context = {"repository": REPOSITORY}
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "links.html",
        "sidebar/scroll-end.html",
    ]
}
templates_path = ["_templates"]
exclude_patterns = ["_build"]
# A fence without a language is what a command printed.
highlight_language = "text"
# Quotes and ellipses; two dashes are an option.
smartquotes_action = "qe"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "amsmath"]
html_math_renderer = "mathjax"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
# NumPy's, whose names are in annotations that Sphinx reads.
nitpick_ignore = [("py:class", f"numpy.{name}") for name in ("dtype", "int16", "int32", "ndarray")]


def setup(app):
    """Leave properties as they are: napoleon takes what stands before a colon for a type."""
    written = {}

    def remember(app, what, name, documented, options, lines):
        written[name] = list(lines)

    def restore(app, what, name, documented, options, lines):
        if what in ("attribute", "property"):
            lines[:] = written[name]

    app.connect("autodoc-process-docstring", remember, priority=400)  # napoleon's is 500
    app.connect("autodoc-process-docstring", restore, priority=600)
