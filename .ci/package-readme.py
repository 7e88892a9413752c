#!/usr/bin/env python3
"""Write python/README.md, which the package index shows: README with absolute addresses.

The index shows a README without its repository, so relative links and pictures would lead nowhere.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGED = ROOT / "python" / "README.md"


def with_absolute_addresses(readme: str, repository: str) -> str:
    """Return a README whose links lead into a repository on GitHub, and pictures to their files."""
    files = repository.replace("github.com", "raw.githubusercontent.com") + "/main"
    relative = r"(?!https?:|#|mailto:)"
    readme = re.sub(rf"(\]\(){relative}", rf"\1{repository}/blob/main/", readme)
    return re.sub(rf'((?:src|srcset)="){relative}', rf"\1{files}/", readme)


def main() -> None:
    """Write the file."""
    project = (ROOT / "pyproject.toml").read_text()
    repository = re.search(r'^Repository = "(.*)"$', project, re.MULTILINE)
    assert repository is not None
    PACKAGED.write_text(with_absolute_addresses((ROOT / "README.md").read_text(), repository[1]))


if __name__ == "__main__":
    main()
