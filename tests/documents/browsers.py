"""What is said of tests that need a browser where there is none."""

import os

NO_BROWSER = "no Chromium is installed"
ADVICE = "apt-get install chromium, or: .venv/bin/python -m playwright install --with-deps chromium"
# Set where a browser is promised, as in the workflow: then such a skip is a failure.
PROMISED = "MOETUNER_TESTS_HAVE_BROWSER"


def skipped_without_browser(reports):
    """Return the names of the tests, of those skipped, that wanted a browser."""
    return [report.nodeid for report in reports if NO_BROWSER in str(report.longrepr)]


def lines_of(names):
    """Return what a run of tests says at its end."""
    if not names:
        return []
    head = f"{len(names)} tests were skipped for want of a browser; to get one: {ADVICE}"
    return [head, *(f"  {name}" for name in names)]


def is_broken_promise(names):
    """Return whether tests were skipped though a browser was promised."""
    return bool(names) and os.environ.get(PROMISED, "") not in ("", "0")
