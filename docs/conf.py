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
# Parts of the page on benchmarks.
exclude_patterns = ["_build", "benchmarks"]
