"""The documentation: `python -m sphinx -W docs build/docs`. Pages with code are run when they have changed."""

import importlib.metadata
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference  # noqa: E402

project = "jaxdtp"
author = "the jaxdtp authors"
copyright = author
release = importlib.metadata.version("jaxdtp")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # formulas need no network
]
exclude_patterns = ["build", "generated"]
html_theme = "furo"
html_title = f"jaxdtp {release}"
html_show_sourcelink = False
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
default_role = "code"
copybutton_prompt_text = ">>> "

clone, version = (os.environ.get(f"READTHEDOCS_GIT_{name}", "") for name in ("CLONE_URL", "IDENTIFIER"))
on_colab = clone.removesuffix(".git").replace("https://github.com", "https://colab.research.google.com/github")
COLAB_BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    f"({on_colab}/blob/{version}/docs/quickstart.ipynb)"
)

(HERE / "generated").mkdir(exist_ok=True)
(HERE / "generated" / "configuration.md").write_text(reference.configuration())


def link_to_colab(app, page, source):
    """A badge, where it is known from which repository on GitHub the pages are built."""
    if page == "start" and clone.startswith("https://github.com/"):
        source[0] = source[0].replace("open `docs/quickstart.ipynb`", COLAB_BADGE)


def setup(app):
    """Docstrings are written for readers of the code."""
    app.connect("source-read", link_to_colab)
    app.connect("autodoc-process-docstring", lambda *event: reference.restructure(event[-1]), priority=100)
    app.connect("autodoc-skip-member", lambda *event: True if reference.is_field(event[3]) else None)
