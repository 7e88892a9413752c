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
# First lines of properties say what comes back, which napoleon takes for types before a colon.
nitpick_ignore_regex = [("py:class", ".*")]
