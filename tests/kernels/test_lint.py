"""What the kernels' source may not contain, whatever the tests of its numbers say."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fluxkiln.kernels

FILES = sorted(Path(fluxkiln.kernels.__file__).parent.glob("*.py"))
BANNED = {
    "tl.make_block_ptr": "removed in Triton 3.8",
    "tl.advance": "removed in Triton 3.8",
    "tl.atomic_add": "sums in an order that changes from run to run",
    "libdevice": "not interpreted",
}


def bare_masked_loads(tree: ast.AST) -> Iterator[int]:
    """Lines of loads that do not say what stands in for the elements they leave out: on a GPU that is undefined."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("tl.load", "language.load")):
            given = {keyword.arg for keyword in node.keywords}
            if (("mask" in given) or len(node.args) > 1) and "other" not in given and len(node.args) < 3:
                yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_masked_load_says_what_the_padding_is(path: Path):
    assert list(bare_masked_loads(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_used_that_not_every_triton_has_or_that_is_not_repeatable(path: Path):
    names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert names.isdisjoint(BANNED), BANNED


def test_the_lint_finds_what_it_is_for():
    bad = "x = tl.load(p, mask=m)\ny = tl.load(p, m)\nz = tl.load(p, mask=m, other=0.0)\nw = tl.load(p)"
    assert list(bare_masked_loads(ast.parse(bad))) == [1, 2]
