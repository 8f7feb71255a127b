"""YAML that is refused with one line, and YAML that is not."""

import pytest

from cluster.errors import MAX_LINE, ConfigError
from cluster.yaml_file import parse_yaml

LAUGHS = "\n".join(
    f"l{i}: &l{i} [{', '.join([f'*l{i - 1}' if i else 'ha'] * 10)}]" for i in range(9)
)
WRONG = [
    ("twice-top", "model: a\nargs: 1\nmodel: b", "line 3, column 1: model stands in line 1"),
    ("twice-inside", "args:\n  slo: {}\n  slo: {}",
     "line 3, column 3: slo stands in line 2 as well"),
    ("twice-one-line", "{port: 1, 'port': 2}", "line 1, column 11: port stands in line 1 as well"),
    ("twice-as-number", "1: a\n0x1: b", "line 2, column 1: 0x1 stands in line 1 as well"),
    ("twice-merged", "x: &x {}\ny:\n  <<: *x\n  <<: *x", "line 4, column 3: << stands in line 3"),
    ("twice-escape", '"a\\eb": 1\n"a\\eb": 2', "line 2, column 1: a\\x1bb stands in line 1"),
    ("deep-lists", "[" * 3000, "line 1, column 33: nested more than 32 deep"),
    ("deep-mappings", "{a: " * 3000, "nested more than 32 deep"),
    ("deep-blocks", "- " * 3000 + "x", "nested more than 32 deep"),
    ("laughs", LAUGHS, "more than 20,000 values, those of aliases included"),
    ("cycle", "a: &a [*a]", "line 1, column 8: an alias stands inside of what it stands for"),
    ("cycle-mapping", "a: &a {b: {c: *a}}", "an alias stands inside of what it stands for"),
    ("alias-of-nothing", "a: *b", "found undefined alias"),
    ("month", "a: 2001-13-01", "line 1, column 4: 2001-13-01 cannot be read as timestamp"),
    ("tag-int", "a: !!int b", "line 1, column 4: b cannot be read as int"),
    ("tag-bool", "a: !!bool b", "line 1, column 4: b cannot be read as bool"),
    ("tag-object", "a: !!python/object:os.system b", "could not determine a constructor"),
    ("no-digits", "a: 0b_", "0b_ cannot be read as int"),
    ("long-number", "a: " + "9" * 5000, "cannot be read as int"),
    ("too-large", "a: 1:" + "1:" * 400 + "1.0", "cannot be read as float"),
    ("long-hex", "a: 0x" + "f" * 9000, "line 1, column 4: a number beyond 64 bits"),
    ("key-list", "? [a]\n: b", "line 1, column 3: a key must be a plain text"),
    ("two-documents", "a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
    ("nul", "a: \0", "unacceptable character #x0000"),
    ("escape", "a: \x1b[31m", "unacceptable character #x001b"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "part"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_wrong_yaml_is_told_in_one_line(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text)
    line = str(caught.value)
    assert line.startswith("is not YAML: ")
    assert part in line
    assert line.isprintable()
    assert len(line) <= MAX_LINE


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("", None, id="nothing"),
        pytest.param("a: {b: 1}\nc: {b: 1}", {"a": {"b": 1}, "c": {"b": 1}}, id="not-one-mapping"),
        pytest.param("a: &x [1]\nb: *x", {"a": [1], "b": [1]}, id="alias"),
        pytest.param(
            "a: &x {m: 1, n: 2}\nb: {<<: *x, m: 5}",
            {"a": {"m": 1, "n": 2}, "b": {"m": 5, "n": 2}},
            id="merged-and-set",
        ),
    ],
)
def test_yaml_that_is_taken(text: str, value: object) -> None:
    assert parse_yaml(text) == value
