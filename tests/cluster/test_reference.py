"""The generated part of README.md."""

from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.reference import BEGIN, END, config_reference, replace_reference

README = Path(__file__).parents[2] / "README.md"


def test_readme_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert replace_reference(text) == text, "run: make docs"


def test_reference_has_a_row_per_field() -> None:
    rows = config_reference().splitlines()
    assert "| `scaling.expected_start_s` | number | `60` |" in rows[-1]
    assert "| `decode.*` | | | The same fields as `prefill.*`. |" in rows
    assert any(row.startswith("| `network.tls.key` | text | unset |") for row in rows)
    assert any(row.startswith("| `served_name` | text | unset |") for row in rows)


def test_only_what_is_between_the_markers_changes() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    expected = f"before\n{BEGIN}\n{config_reference()}\n{END}\nafter\n"
    assert replace_reference(text) == expected


def test_missing_markers_are_refused() -> None:
    with pytest.raises(ClusterError):
        replace_reference(f"{BEGIN} only")
