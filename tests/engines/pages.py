"""Type the commands of an engine's page as they are printed, on a tiny model and two ranks.

A page sets variables of the shell in its first fence; here they have other values, and nothing else
is different. A command that starts a server is left to run until the next one, or the page's end;
what follows is typed once it answers. `bin/` stands before the rest of the path: there `vllm` and
`python` add what a machine without a GPU needs to the commands that start a server.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "engines"
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
SERVER = re.compile(r"\b(vllm serve|sglang\.launch_server)\b")
ASSIGNMENT = re.compile(r"(\w+=\S*\s*)+(#.*)?")
LIMIT = 900  # seconds until a server answers


@dataclass
class Typed:
    """A command, and what came of it."""

    command: str
    status: int
    output: str


def commands(page: str) -> list[str]:
    """Return the commands of a page in order, without those that set variables."""
    lines = [
        line.strip()
        for fence in FENCE.findall((DOCS / page).read_text())
        for line in fence.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line and line[0] != "#" and not ASSIGNMENT.fullmatch(line)]


class Shell:
    """Types commands in a folder, and knows the server that runs."""

    def __init__(self, folder: Path, port: int, environment: dict[str, str]) -> None:
        self.folder, self.health = folder, f"http://127.0.0.1:{port}/health"
        path = f"{HERE / 'bin'}:{environment.pop('PATH')}"
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment, "PATH": path}
        self.server: subprocess.Popen[bytes] | None = None

    def type(self, command: str) -> Typed:
        """Run a command to its end; one that starts a server until that answers."""
        if SERVER.search(command):
            self.close()
            return self.start(command)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        return Typed(command, done.returncode, done.stdout)

    def start(self, command: str) -> Typed:
        """Start a server, and wait until it answers."""
        log = self.folder / f"server-{len(list(self.folder.glob('server-*')))}.txt"
        with log.open("w") as file:
            self.server = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.folder,
                env={**self.environment, "ENGINES_MAPS": str(log.with_suffix(".maps"))},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + LIMIT
        while not self.answers():
            if self.server.poll() is not None or time.monotonic() > deadline:
                return Typed(command, self.server.poll() or 1, log.read_text()[-4000:])
            time.sleep(1)
        return Typed(command, 0, str(log))

    def answers(self) -> bool:
        """Whether the server is up."""
        try:
            with urllib.request.urlopen(self.health, timeout=10):
                return True
        except (OSError, urllib.error.URLError):
            return False

    def close(self) -> None:
        """End the server that runs, if one does, and wait until its port is free."""
        if self.server is None:
            return
        os.killpg(self.server.pid, signal.SIGTERM)
        try:
            self.server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
        self.server = None
        while self.answers():
            time.sleep(1)
