"""CORD's accuracy by normalized tree edit distance (nTED), for forms as trees.

Source: Donut (arXiv 2111.15664), ``JSONParseEvaluator``: accuracy = max(0, 1 - TED(answer, truth) / TED(empty, truth)).
The distance is Zhang and Shasha's (SIAM J. Comput. 18(6), 1989), which Donut takes from ``zss``; that package has had
no release since 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz.distance import Levenshtein


@dataclass(slots=True)
class FormNode:
    """A node of a form's tree: a key, an entry of a list, or the text of a leaf."""

    label: str
    leaf: bool = False
    children: list[FormNode] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """The cost to insert or to remove the node: the letters of a leaf, 1 for another."""
        return len(self.label) if self.leaf else 1

    def cost_to(self, other: FormNode) -> int:
        """Return what it costs to make this node the other one."""
        if self.leaf and other.leaf:
            return Levenshtein.distance(self.label, other.label)
        if self.leaf or other.leaf:
            return 1 + len(self.label if self.leaf else other.label)
        return int(self.label != other.label)


def normalize_form(value: Any) -> Any:
    """Return a form with sorted keys, lists of stripped texts as leaves, and nothing empty.

    As in the original, the JSON values 0 and false are empty too, except in a list of texts and numbers.

    Source: Donut, ``normalize_dict``.
    """
    if not value:
        return {}
    if isinstance(value, Mapping):
        made = {}
        for key in sorted(map(str, value), key=lambda name: (len(name), name)):
            inner = normalize_form(value[key])
            if inner:
                made[key] = inner if isinstance(inner, list) else [inner]
        return made
    if not isinstance(value, list):
        return [str(value).strip()]
    if all(isinstance(one, Mapping) for one in value):
        return [inner for inner in map(normalize_form, value) if inner]
    plain = [one for one in value if isinstance(one, str | int | float) and not isinstance(one, bool)]
    return [text for one in plain if (text := str(one).strip())]


def make_tree(form: Any, name: str = "<root>") -> FormNode:
    """Return the tree of a form from ``normalize_form``. Source: Donut, ``construct_tree_from_dict``."""
    node = FormNode(name)
    if isinstance(form, Mapping):
        node.children = [make_tree(inner, key) for key, inner in form.items()]
    elif all(isinstance(one, Mapping) for one in form):
        node.children = [make_tree(one, "<subtree>") for one in form]
    else:
        node.children = [FormNode(str(one), leaf=True) for one in form]
    return node


def tree_accuracy(answer: Any, truth: Any) -> float:
    """Return CORD's accuracy of an answer, from 0 to 1; 1 for an empty answer to an empty truth.

    Args:
        answer: A form as JSON; anything that is neither an object nor a list is an empty one.
        truth: The form that is right.
    """
    answer, truth = (one if isinstance(one, Mapping | list) else {} for one in (answer, truth))
    right = make_tree(normalize_form(truth))
    most = tree_distance(make_tree({}), right)
    distance = tree_distance(make_tree(normalize_form(answer)), right)
    return max(0.0, 1.0 - distance / most) if most else float(distance == 0)


def tree_distance(first: FormNode, second: FormNode) -> int:
    """Return the smallest cost of the changes that turn one ordered tree into the other."""
    one, other = _Ordered(first), _Ordered(second)
    distances = [[0] * len(other.nodes) for _ in one.nodes]
    for root in one.key_roots:
        for other_root in other.key_roots:
            _fill(one, other, root, other_root, distances)
    return distances[-1][-1]


class _Ordered:
    """The nodes of a tree in postorder.

    Attributes:
        leftmost: The index of each node's leftmost leaf.
        key_roots: The nodes that have a sibling on their left, and the root.
    """

    def __init__(self, root: FormNode) -> None:
        self.nodes: list[FormNode] = []
        self.leftmost: list[int] = []
        self._add(root)
        self.key_roots = sorted({first: index for index, first in enumerate(self.leftmost)}.values())

    def _add(self, node: FormNode) -> int:
        first = [self._add(child) for child in node.children]
        self.nodes.append(node)
        self.leftmost.append(first[0] if first else len(self.nodes) - 1)
        return self.leftmost[-1]


def _fill(one: _Ordered, other: _Ordered, root: int, other_root: int, distances: list[list[int]]) -> None:
    """Compute the distances of the subtrees that end in two key roots, from those of smaller ones."""
    start, other_start = one.leftmost[root], other.leftmost[other_root]
    forest = [[0] * (other_root - other_start + 2) for _ in range(root - start + 2)]
    for row in range(1, len(forest)):
        forest[row][0] = forest[row - 1][0] + one.nodes[start + row - 1].cost
    for column in range(1, len(forest[0])):
        forest[0][column] = forest[0][column - 1] + other.nodes[other_start + column - 1].cost
    for row in range(1, len(forest)):
        node = start + row - 1
        for column in range(1, len(forest[0])):
            target = other_start + column - 1
            changes = min(
                forest[row - 1][column] + one.nodes[node].cost, forest[row][column - 1] + other.nodes[target].cost
            )
            if one.leftmost[node] == start and other.leftmost[target] == other_start:
                replaced = forest[row - 1][column - 1] + one.nodes[node].cost_to(other.nodes[target])
                distances[node][target] = forest[row][column] = min(changes, replaced)
            else:
                before = forest[one.leftmost[node] - start][other.leftmost[target] - other_start]
                forest[row][column] = min(changes, before + distances[node][target])
