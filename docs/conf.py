"""Sphinx's configuration: Markdown pages, formulas as MathML, and docstrings whose marks are Markdown's too."""

import re

import latex2mathml.converter
from docutils import nodes

import lookahead_optim

project = "lookahead-optim"
project_copyright = "the lookahead-optim authors"
version = release = lookahead_optim.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"lookahead-optim {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
# Browsers render it by themselves; MathJax would come from another site.
html_math_renderer = "mathml"
# Parts of the pages on benchmarks and experiments.
exclude_patterns = ["_build", "benchmarks", "experiments/drawn"]


def _math(self, node):
    display = node.tagname == "math_block"
    self.body.append(latex2mathml.converter.convert(node.astext(), display="block" if display else "inline"))
    raise nodes.SkipNode


_MARKS = re.compile(
    r"\$\$(?P<display>.+?)\$\$|\$(?P<inline>[^$\n]+)\$|\[(?P<text>[^\]]+)\]\((?P<link>https?://[^)]+)\)"
    r"|``[^`]+``|:\w+:`[^`]+`|`(?P<code>[^`]+)`(?!_)",
    re.DOTALL,
)


def _restructured(found):
    if found["display"]:
        return f".. math:: {' '.join(found['display'].split())}\n"
    if found["inline"]:
        return f":math:`{found['inline']}`"
    if found["link"]:
        return f"`{' '.join(found['text'].split())} <{found['link']}>`__"
    return f"``{found['code']}``" if found["code"] else found[0]


def _to_restructured_text(app, what, name, obj, options, lines):
    """Turn a docstring's Markdown marks into those that autodoc reads."""
    text = "\n".join(lines)
    if what in ("property", "attribute"):
        # Napoleon takes what stands before a colon for a type.
        text = text.replace(": ", ", ", 1)
    lines[:] = _MARKS.sub(_restructured, text).split("\n")


def setup(app):
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    # Before napoleon, whose priority is the default of 500.
    app.connect("autodoc-process-docstring", _to_restructured_text, priority=400)
