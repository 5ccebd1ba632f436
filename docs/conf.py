"""Sphinx: the pages are Markdown (MyST); the API comes from docstrings (autodoc) and public headers (Doxygen, Breathe).

make docs builds it; build/docs/doxygen/xml has what Doxygen found.
"""

import os
from pathlib import Path

import muddformer

HERE = Path(__file__).resolve().parent

project = "muddformer"
author = "the muddformer authors"
release = version = muddformer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "breathe"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["duplicate_declaration.cpp"]  # every header opens the namespace

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_class_signature = "separated"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
typehints_use_signature_return = True
python_use_unqualified_type_names = True

breathe_projects = {"muddformer": os.environ.get("DOXYGEN_XML", str(HERE.parent / "build/docs/doxygen/xml"))}
breathe_default_project = "muddformer"
breathe_default_members = ("members",)
breathe_show_include = False
# What Doxygen leaves of declarations, and C++ without a namespace of ours.
cpp_id_attributes = ["MUDDFORMER_API"]

html_theme = "furo"
html_title = f"muddformer {version}"
html_show_sphinx = False
