"""Print the oldest version of each dependency that pyproject.toml allows, as constraints of pip."""

import re
import sys
from pathlib import Path

tables = Path(sys.argv[1]).read_text().partition("[project.scripts]")[0]
for name, version in sorted(set(re.findall(r'"([\w-]+)>=([\d.]+)[^"]*"', tables))):
    if name not in ("maturin", "torch", "transformers", "kaleido"):
        print(f"{name}=={version}")  # noqa: T201
