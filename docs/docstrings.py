"""Translates the docstrings' Sphinx roles and mathematics for the site: MathML needs no script to be shown."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
# The directive's text on its own line, and the indented lines that go on with it.
MATH_BLOCK = re.compile(r"^\.\. math::[ ]*(.*(?:\n[ ]+\S.*)*)$", re.MULTILINE)


def translate(docstring: str) -> str:
    """The docstring in Markdown."""
    docstring = MATH_BLOCK.sub(lambda found: convert(" ".join(found[1].split()), display="block"), docstring)
    docstring = INLINE_MATH.sub(lambda found: convert(found[1]), docstring)
    return ROLE.sub(r"`\1`", docstring)


class Docstrings(griffe.Extension):
    """Hands every docstring to :func:`translate` before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = translate(obj.docstring.value)
