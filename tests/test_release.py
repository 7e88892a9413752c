"""What a release promises beside the code: one version, pinned workflows, and a short README."""

import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from browsers import ADVICE, PROMISED

import moetuner as mt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def test_the_version_is_the_same_everywhere():
    """Core, CITATION.cff and the newest heading of the changelog agree."""
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation[1] == mt.__version__
    assert next(heading for heading in headings if heading != "Unreleased") == mt.__version__


def test_the_distribution_says_what_it_is():
    """Typed, for each Python that it supports, with its addresses."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    classifiers = about["classifiers"]
    assert "Typing :: Typed" in classifiers
    oldest = int(re.search(r"3\.(\d+)", about["requires-python"])[1])
    versions = [f"Programming Language :: Python :: 3.{minor}" for minor in range(oldest, 15)]
    assert [entry for entry in classifiers if re.search(r":: 3\.\d", entry)] == versions
    assert about["urls"].keys() >= {"Repository", "Documentation", "Changelog", "Issues", "Paper"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned(path):
    """An action is named by the hash of a commit, its version beside it; workflows are our own."""
    uses = re.findall(r"uses: (?!\./\.github/workflows/)(.*)$", path.read_text(), re.MULTILINE)
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\S+", use)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_is_there(path):
    """Targets of make and scripts that a workflow runs exist, and it may do nothing else."""
    text = path.read_text()
    named = re.findall(r"(?:run: |^ +)make (?:--directory \S+ )?([a-z -]+)", text, re.MULTILINE)
    assert {target for line in named for target in line.split()} <= TARGETS
    for script in re.findall(r"(?:\.ci|tests)/[\w-]+\.(?:sh|py)", text):
        assert (ROOT / script).is_file(), script
    assert re.search(r"^permissions: \{\}$", text, re.MULTILINE)


def test_a_tag_is_published_after_the_tests():
    """Only wheels.yml runs for a tag; what publishes there waits for the tests, and for all wheels.

    What it calls is there, may be called, and has a group of runs of its own: with the caller's it
    would wait for the caller, for ever.
    """
    texts = {path.name: path.read_text() for path in WORKFLOWS}
    assert [name for name, text in texts.items() if "tags:" in text] == ["wheels.yml"]
    jobs = dict(
        re.findall(r"^  ([\w-]+):\n((?:(?:    .*)?\n)+)", texts["wheels.yml"], re.MULTILINE)
    )
    assert "needs: [tests, wheel, sdist]" in jobs["publish"]
    assert "needs: publish" in jobs["documents"]
    for name in ("tests", "documents"):
        assert f"uses: ./.github/workflows/{name}.yml" in jobs[name]
        assert "  workflow_call:" in texts[f"{name}.yml"]
        assert f"group: {name}-${{{{ github.ref }}}}" in texts[f"{name}.yml"]


def test_wheels_are_of_the_systems_that_the_package_names():
    """README, classifiers and workflows say the same: Linux."""
    named = re.findall(
        r"^  \"Operating System :: (.*)\"", (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert named == ["POSIX :: Linux"]
    assert "On Linux, with Python" in (ROOT / "README.md").read_text()
    wheels = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    targets = re.findall(r"target: ([\w-]+)", wheels)
    assert len(targets) == 4
    assert all("-unknown-linux-" in target for target in targets)


def test_targets_call_scripts_that_are_there():
    """Every script of `.ci` that the Makefile calls exists and may be run."""
    called = set(re.findall(r"\.ci/[\w-]+\.sh", MAKEFILE))
    assert len(called) >= 5
    for script in called:
        assert (ROOT / script).stat().st_mode & 0o111, script


def test_the_image_has_a_rust_that_the_core_allows():
    """It is no older than what Cargo.toml says, which `make check-rust` compiles with."""
    about = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]
    image = re.search(r"^FROM rust:([\d.]+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    oldest, used = (
        tuple(map(int, version.split("."))) for version in (about["rust-version"], image[1])
    )
    assert used >= oldest


def test_the_oldest_dependencies_are_those_of_the_package():
    """Each dependency with a lower bound is a constraint, of that version."""
    command = [sys.executable, ROOT / ".ci" / "oldest.py", ROOT / "pyproject.toml"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [re.match(r"([\w-]+)>=([\d.]+)", entry).groups() for entry in about["dependencies"]]
    assert len(bounds) >= 4
    assert {f"{name}=={version}" for name, version in bounds} <= set(said)


def test_tests_without_a_browser_say_how_to_get_one(tmp_path):
    """Each is named, with what to install; where a browser is promised, the run fails."""
    name = "tests/report/test_page.py::test_printed_at_once_is_printed_later"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    # Nothing is found there, neither programs nor Playwright's.
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), PROMISED: "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert f"1 tests were skipped for want of a browser; to get one: {ADVICE}" in done.stdout
    assert f"\n  {name}\n" in done.stdout
    assert done.returncode == 1, done.stdout + done.stderr


def test_an_empty_root_that_cannot_be_had_is_left_out_with_a_reason(tmp_path):
    """Without debootstrap the script says so in one line, and how to get it, with status 0."""
    for program in ("bash", "dirname", "realpath"):
        (tmp_path / program).symlink_to(shutil.which(program))
    command = [ROOT / ".ci" / "empty-root.sh", ROOT / "README.md"]
    environment = {"PATH": str(tmp_path)}
    done = subprocess.run(
        ["/usr/bin/env", *command], capture_output=True, text=True, env=environment, check=True
    )
    expected = "not used in an empty root: no debootstrap here (apt-get install debootstrap)\n"
    assert done.stdout == expected


def test_the_package_index_shows_addresses_that_lead_somewhere():
    """Its README is the README with absolute addresses; `make wheel` writes it."""
    spec = spec_from_file_location("package_readme", ROOT / ".ci" / "package-readme.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    readme, packaged = (ROOT / "README.md").read_text(), script.PACKAGED.read_text()
    project = (ROOT / "pyproject.toml").read_text()
    repository = re.search(r'^Repository = "(.*)"$', project, re.MULTILINE)[1]
    assert packaged == script.with_absolute_addresses(readme, repository)
    addresses = re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)"', packaged)
    assert len(addresses) > 30
    assert all(re.match("https?://|#|mailto:", "".join(address)) for address in addresses)
    # The path behind each is in the repository.
    inside = re.findall(rf"{repository}/blob/main/([^)#\s]+)", packaged)
    inside += re.findall(r"raw.githubusercontent.com/moetuner/moetuner/main/([^\"]+)", packaged)
    assert len(inside) > 20
    assert [path for path in inside if not (ROOT / path).exists()] == []


def test_both_commands_for_a_fresh_machine_are_named():
    """README names what sets up and runs everything, which is what CI runs."""
    readme = (ROOT / "README.md").read_text()
    assert "`make demo`" in readme
    assert "`make test`" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_a_step_fails_where_a_part_of_its_pipe_does():
    """GitHub's default shell has no pipefail; bash that is named has."""
    for path in WORKFLOWS:
        text = path.read_text()
        assert re.search(r"^[^#\n]*\S \| \S", text, re.MULTILINE) is None or "shell: bash" in text


def test_the_readme_is_short():
    """README has at most 120 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_documents_of_all_versions_stand_side_by_side(tmp_path):
    """The front page leads to the newest tag, by number, and lists every version."""
    site = tmp_path / "site.git"
    subprocess.run(["git", "init", "--quiet", "--bare", site], check=True)
    (tmp_path / "html").mkdir()
    for number, version in enumerate(["main", "v0.9.0", "v0.10.0", "main"]):
        (tmp_path / "html" / "index.html").write_text(f"{number}")
        command = [ROOT / ".ci" / "publish-documents.sh", tmp_path / "html", version, site]
        subprocess.run(command, check=True)
    show = ["git", "--git-dir", site, "show"]
    pages = [
        subprocess.run([*show, f"gh-pages:{path}"], capture_output=True, text=True, check=True)
        for path in ("main/index.html", "v0.9.0/index.html", "index.html")
    ]
    assert [page.stdout for page in pages[:2]] == ["3", "1"]
    assert "url=v0.10.0/" in pages[2].stdout
    assert re.findall(r'<li><a href="(.*?)/">', pages[2].stdout) == ["v0.10.0", "v0.9.0", "main"]


def test_documents_before_the_first_tag_have_a_front_page(tmp_path):
    """It leads to what there is."""
    site = tmp_path / "site.git"
    subprocess.run(["git", "init", "--quiet", "--bare", site], check=True)
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("page")
    command = [ROOT / ".ci" / "publish-documents.sh", tmp_path / "html", "main", site]
    subprocess.run(command, check=True)
    show = ["git", "--git-dir", site, "show", "gh-pages:index.html"]
    page = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    assert "url=main/" in page
