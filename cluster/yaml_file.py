"""YAML as a config may be written: no key twice, nothing nested or repeated without end.

Owns reading text as YAML; knows no field. PyYAML by itself takes the last of two equal keys, and
ends in a traceback on values such as a month 13.
"""

from typing import Any

import yaml

from cluster.errors import ConfigError

MAX_DEPTH = 32
"""Of mappings and lists in one another; a config needs about ten."""
MAX_NODES = 20_000
"""With what aliases (`*name`) repeat counted as often as it is repeated."""
MAX_INT = 2**63
"""Larger numbers fit no field, and Python takes quadratic time to print them."""

_MERGE_TAG = "tag:yaml.org,2002:merge"


def parse_yaml(text: str) -> object:
    """The only document in `text`.

    Raises:
        ConfigError: one line with the place and what is wrong there.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"is not YAML: {place}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark, is_alias = event.start_mark, isinstance(event, yaml.AliasEvent)
        if self._depth == MAX_DEPTH:
            raise _error(f"nested more than {MAX_DEPTH} deep", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and node not in self._sizes:
            raise _error("an alias stands inside of what it stands for", mark)
        if node is not None:
            self._sizes[node] = 1 + sum(self._sizes[part] for part in _parts(node))
            if self._sizes[node] > MAX_NODES:
                raise _error(f"more than {MAX_NODES:,} values, those of aliases included", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[object, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be a plain text", key.start_mark)
            name = key.value if key.tag == _MERGE_TAG else self.construct_object(key)
            line = key.start_mark.line + 1
            if name in lines:
                raise _error(f"{key.value} stands in line {lines[name]} as well", key.start_mark)
            lines[name] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, KeyError, ValueError):
            kind = node.tag.rpartition(":")[2]
            raise _error(f"{node.value} cannot be read as {kind}", node.start_mark) from None
        if isinstance(value, int) and abs(value) > MAX_INT:
            raise _error("a number beyond 64 bits", node.start_mark)
        return value


_Loader.add_constructor(
    # What vLLM may import (lm-format-enforcer) has all of PyYAML's loaders take dates for texts.
    "tag:yaml.org,2002:timestamp",
    yaml.constructor.SafeConstructor.construct_yaml_timestamp,  # type: ignore[type-var]
)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
