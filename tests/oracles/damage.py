"""Damage to files: bits flipped, bytes set, inserted, deleted and copied, ends cut off."""

from hypothesis import strategies as st

damage = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "cut", "copy"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"9", b"-", b"\n", b"\0"])),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content, steps):
    """Apply some damage."""
    content = bytearray(content)
    for kind, where, what in steps:
        # Headers are where the interesting bytes are: half of the damage goes there.
        length = len(content) if int(where * 1e6) % 2 else min(len(content), 300)
        at = int(where * length)
        if kind == "flip" and content:
            content[at] ^= 1 << what[0] % 8
        elif kind == "set":
            content[at : at + len(what)] = what
        elif kind == "insert":
            content[at:at] = what
        elif kind == "delete":
            del content[at : at + 1 + what[0] % 16]
        elif kind == "cut":
            del content[at:]
        elif kind == "copy":
            content[at:at] = content[at : at + what[0]]
    return bytes(content)


def check_line(error, path):
    """Assert that an error is one line of readable length that names the file."""
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    assert str(path) in text
