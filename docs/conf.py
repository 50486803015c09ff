"""Sphinx configuration. `make docs` builds with warnings as errors.

Nothing is fetched, neither by the build nor by whoever reads the pages: formulas become MathML here, by docutils, and
browsers draw it; the notebook `first-room` is run by the build, with the models that ship.
"""

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import enfilade

project = "Enfilade"
author = "the Enfilade authors"
copyright = "2026, the Enfilade authors"
release = enfilade.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "auto"  # the notebook is kept without its outputs
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "Enfilade"
html_static_path = ["images", "static"]
html_css_files = ["formulas.css"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
autodoc_typehints = "none"  # shapes stand in the docstrings; jaxtyping's strings confuse the cross-references
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
nitpicky = False


def mathml(translator, node, block: bool) -> str:
    """A formula's LaTeX as MathML; what docutils does not know is a warning, which stops the build."""
    try:
        return tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        return translator.encode(node.astext())


def inline_formula(translator, node) -> None:
    translator.body.append(mathml(translator, node, block=False))
    raise SkipNode


def block_formula(translator, node) -> None:
    wide = f'<div class="math" style="overflow-x: auto">{mathml(translator, node, block=True)}</div>\n'
    translator.body.append(wide)
    raise SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (inline_formula, None), (block_formula, None))
