"""The page with recipes: each section imports what it needs, and recipes for packages that are not installed here.

All other blocks of the page run with the page itself, see `conftest.py`.
"""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
# What a section prints is in a block of text if its Python does not run with the page.
PARTS = re.findall(r"^#{2,3} (.*)\n((?:(?!#{2,3} ).*\n)*)", PAGE, flags=re.MULTILINE)
BLOCKS = [
    (f"{number} {heading}", re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL))
    for number, (heading, text) in enumerate(PARTS)
]
SECTIONS = {heading: blocks for heading, blocks in BLOCKS if blocks}
PACKAGES = {"timm": "timm.optim", "fastai": "fastai.learner", "tensorboard": "torch.utils.tensorboard"}


def code(blocks):
    """Return the Python of a section."""
    return "\n".join(text for kind, text in blocks if kind in ("python", "py"))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_imports_all_that_it_needs(section):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    done = subprocess.run(command, input=code(SECTIONS[section]), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_a_recipe_for_another_package_prints_what_the_page_says(package, tmp_path, monkeypatch):
    pytest.importorskip(PACKAGES[package], exc_type=ImportError)
    (blocks,) = [
        blocks for blocks in SECTIONS.values() if any(package in text for kind, text in blocks if kind == "py")
    ]
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code(blocks), {"__name__": "recipe"})
    expected = [text for kind, text in blocks if kind in ("output", "text")]
    assert printed.getvalue().endswith("".join(expected))


def test_the_sections_are_found():
    assert len(SECTIONS) > 10
