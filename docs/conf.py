"""Sphinx configuration. `make docs` builds with warnings as errors."""

import enfilade

project = "Enfilade"
author = "the Enfilade authors"
copyright = "2026, the Enfilade authors"
release = enfilade.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "Enfilade"
html_static_path = ["images"]
exclude_patterns = ["_build"]
autodoc_typehints = "none"  # shapes stand in the docstrings; jaxtyping's strings confuse the cross-references
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
nitpicky = False
