"""Sphinx: `make docs` builds docs/_build/html, and stops at every dead link or unknown name."""

from importlib.metadata import version as version_of

project = "moetuner"
author = "the moetuner authors"
version = release = version_of("moetuner")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.autosummary",
]
html_theme = "furo"
html_title = f"moetuner {version}"
exclude_patterns = ["_build"]
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
