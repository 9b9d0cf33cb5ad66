"""Parse YAML with bounds, so that nesting or aliases in a small file cannot exhaust memory."""

from itertools import chain
from typing import Any

import yaml

_MOST_NODES = 20_000
_MOST_LEVELS = 50


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # The parser's time grows with the square of the depth: 6 s for 60 KB of brackets.
        if self.flow_level >= _MOST_LEVELS:
            raise ValueError("it is nested too deeply")
        super().fetch_flow_collection_start(TokenClass)


def parse_yaml(text: str) -> Any:
    """Parse safe YAML; ValueError if it is invalid or holds too many values.

    An alias counts as many values as it stands for. Ten lines, each with ten aliases of the line
    before, stand for ten billion values, which merge keys and error messages would write out.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > _MOST_NODES:
            raise ValueError(f"it holds more than {_MOST_NODES} values, aliases written out")
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    # PyYAML's constructors raise IndexError, KeyError, AttributeError and more on odd scalars.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values in a node; an alias counts as many values as it stands for."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = _MOST_NODES + 1  # the count that a node which contains itself will find
        mapping = isinstance(node, yaml.MappingNode)
        children = chain.from_iterable(node.value) if mapping else node.value
        counts[id(node)] = 1 + sum(_count(child, counts) for child in children)
    return counts[id(node)]
