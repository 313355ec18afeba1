import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config.yaml_text import parse, render

CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")  # those of a file's name
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(CHARACTERS),
    lambda leaves: st.lists(leaves, max_size=3) | st.dictionaries(st.text(CHARACTERS, max_size=8), leaves, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4e-4", 4e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("1e400", math.inf),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("2_000_000", 2_000_000),
        ("true", True),
        ("~", None),
        ("", None),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_", "1_"),
        ("e4", "e4"),
        ("'4e-4'", "4e-4"),
        ("[1, 2e1, x]", [1, 20.0, "x"]),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(parse(".nan"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1,\nc: 2", "line 3: "),
        ("a: 1\nb: 2\na: 3", "line 3: a: this key appears twice"),
        ("x: {a: 1, a: 2}", "line 1: a: this key appears twice"),
        ("x:\n  1: a", "line 2: a key must be text"),
        ("a: 1\n---\nb: 2", "single document"),
        ("a: &x [*x]", "recursive"),
        ("a: !!python/object/apply:os.getcwd []", "line 1: "),
        ("a: \x01", "special characters"),
        ("a: " + "[" * 20_000, "nested too deeply"),
        ("a: 0x" + "f" * 9_000, "a number of more than 1024 bits"),
        ("a: " + "9" * 5_000, "Exceeds the limit"),
        ('a: "\\0"', "text with a NUL"),
        ('"a\\ud800": 1', "half of a surrogate pair"),
        ("a: !!set {b}", "a value of the type set"),
        ("a: !!binary aGVsbG8=", "a value of the type bytes"),
        ("a: " + "[" * 65 + "]" * 65, "nested too deeply"),
        (
            "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" if n else "a0: &a0 [1]" for n in range(9)),
            "more than 1,000,000 values",
        ),
    ],
)
def test_bad_documents_are_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse(text)
    assert len(str(caught.value).splitlines()) == 1


@given(TREES)
def test_what_is_rendered_reads_back(value: object) -> None:
    assert repr(parse(render(value))) == repr(value)


@pytest.mark.parametrize(
    "text", ["4e-4", "on", "010", "1_000", "null", "2024-01-01", "a\nb ", "=", "<<", "\x85", "\u2028"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse(render({"name": text})) == {"name": text}
