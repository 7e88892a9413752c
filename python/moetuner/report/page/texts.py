"""The files of a page that are our own."""

from importlib import resources


def own(name: str) -> str:
    """Read a template, a script or a style sheet."""
    return (resources.files("moetuner") / "report" / "page" / name).read_text(encoding="utf-8")
