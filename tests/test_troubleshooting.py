"""The page on troubleshooting has every message that the package raises or warns with."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "lookahead_optim"
PAGE = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
SHORTEST = 20


def template(message):
    """Return the text of a literal, with a null character for every part that varies."""
    if isinstance(message, ast.JoinedStr):
        return "".join(map(template, message.values))
    return message.value if isinstance(message, ast.Constant) and isinstance(message.value, str) else "\0"


def messages():
    """Yield the name of a module and the longest constant fragment of the first sentence of each of its messages."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            warns = isinstance(call, ast.Call) and ast.unparse(call.func) in ("warnings.warn", "warn")
            if isinstance(call, ast.Call) and call.args and (warns or isinstance(node, ast.Raise)):
                sentence = re.split(r"\.\s", template(call.args[0]), maxsplit=1)[0]
                fragment = max((" ".join(one.split()) for one in sentence.split("\0")), key=len)
                if len(fragment) >= SHORTEST:
                    module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
                    yield pytest.param(fragment, id=f"{module}: {fragment:.40}")


@pytest.mark.parametrize("fragment", list(messages()))
def test_the_page_has_the_message(fragment):
    assert fragment in PAGE


def test_messages_are_found():
    assert len(list(messages())) > 50
