"""The site: `make docs` builds it from these pages and the docstrings, and fails on a warning."""

import sys
from pathlib import Path

import dualtoken_vit

sys.path.insert(0, str(Path(__file__).with_name("_ext")))

project = "DualToken-ViT"
version = release = dualtoken_vit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "flags", "pages"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {version}"
html_show_copyright = False

myst_heading_anchors = 4  # as GitHub's, to which the pages link
myst_enable_extensions = ["colon_fence", "deflist"]
smartquotes = False  # two hyphens are two hyphens
highlight_language = "text"  # blocks without a language are output and file trees

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True}
python_maximum_signature_line_length = 100
nitpicky = False  # types of timm, torch and torchvision have no inventory without a network
