"""Sphinx's configuration: Markdown pages, docstrings in reStructuredText, formulas as MathML."""

from docutils.writers.html5_polyglot import HTMLTranslator

import lookahead_optim

project = "lookahead-optim"
project_copyright = "the lookahead-optim authors"
version = release = lookahead_optim.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_math_dollar"]
# In docstrings, which have `code` and $formulas$ too.
default_role = "code"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"lookahead-optim {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
# Browsers render MathML, which `docutils.conf` asks for, by themselves; MathJax would come from another site.
html_math_renderer = "docutils"
# Parts of the pages on benchmarks and experiments.
exclude_patterns = ["_build", "benchmarks", "benchmarks_gpu", "experiments/drawn"]


def setup(app):
    app.add_html_math_renderer("docutils", (HTMLTranslator.visit_math, None), (HTMLTranslator.visit_math_block, None))
