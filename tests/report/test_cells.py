"""Numbers as tables and sentences have them: thousands, digits and units alike."""

import pytest

from moetuner.files.cells import in_bytes, number


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.4e6, "999 MB"),
        (999.6e6, "1 GB"),
        (12_345e6, "12.3 GB"),
        (999.6e9, "1 TB"),
        (1234e12, "1,230 TB"),
    ],
)
def test_bytes_have_three_digits_and_the_unit_that_they_round_to(count, text):
    """No power of ten, and no thousand of a unit where there is a larger one."""
    assert in_bytes(count) == text


def test_numbers_of_tables_have_thousands():
    """As those of sentences have."""
    assert (number(12345.678, 1), number(0.5, 3), number(None, 1)) == ("12,345.7", "0.500", "-")
