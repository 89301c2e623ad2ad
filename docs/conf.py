"""Sphinx's configuration: Markdown pages, docstrings in reStructuredText, formulas as MathML."""

from docutils.writers.html5_polyglot import HTMLTranslator

import lookahead_optim

project = "lookahead-optim"
project_copyright = "the lookahead-optim authors"
version = release = lookahead_optim.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_math_dollar"]
# For docstrings: plain backticks mean code.
default_role = "code"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
autodoc_member_order = "bysource"
# The outline of a page has short names: `sync()`, not `Lookahead.sync()`.
toc_object_entries_show_parents = "hide"
# Copied code has no prompts. Output has no button.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = "div:not(.highlight-output) > div.highlight > pre"
html_theme = "furo"
html_title = f"lookahead-optim {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
# `docutils.conf` asks for MathML, which browsers render. MathJax would be loaded from another site.
html_math_renderer = "docutils"
# Other pages include these files.
exclude_patterns = ["_build", "benchmarks", "benchmarks_gpu", "experiments/drawn"]


def setup(app):
    app.add_html_math_renderer("docutils", (HTMLTranslator.visit_math, None), (HTMLTranslator.visit_math_block, None))
