"""One configuration for both languages; ``-D language=...`` says which one is built."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "extensions")]

# Sphinx runs this file without having its folder on the path, so the path must be set first.
import python_inventory  # noqa: E402 -- lies in extensions/, which the line above adds
import settings  # noqa: E402 -- lies beside this file, in the folder that the line above adds

# sphinx-autodoc-typehints 3.6, the newest for Python 3.11, calls what Sphinx 10 will remove.
warnings.filterwarnings("ignore", message=".*set_application.*")

project = "concurrency-patterns"
author = "The concurrency-patterns authors"
copyright = f"2026, {author}"  # noqa: A001 -- Sphinx reads the setting of this name
language = "en"  # -D language=zh_CN builds the Chinese site

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "docstrings",  # between the two, see there
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_codeautolink",
    "languages",
    "bigrams",
    "prose",
    "picture",
    "defaults",
    "measured",
    "performance",
    "reliability",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_ref_domains = ["std"]  # [text](#label) never means a function of that name
myst_enable_extensions = ["colon_fence", "deflist"]
# MyST would rather have the description of a page under another key, one level deeper.
suppress_warnings = ["myst.topmatter"]
nitpicky = True

# The inventory of the standard library is made here, so that no build asks the network for it.
intersphinx_mapping = {
    "python": (
        "https://docs.python.org/3/",
        python_inventory.write(HERE.parent / "build" / "python.inv"),
    )
}
nitpick_ignore_regex = [
    ("py:.*", r"(concurrency_patterns\.\w+\.)?(\w*T|P|R|K|V|Item|Result)(\.args|\.kwargs)?"),
]

# In the order of the source: the module's main class comes first. Sphinx would take that of
# __all__, which is alphabetical; what is not in __all__ is left out by docstrings.py.
autodoc_default_options = {"members": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # sphinx-autodoc-typehints writes them
always_use_bars_union = True
typehints_use_rtype = True  # a line of its own: what is returned is translated, its type is not
typehints_document_rtype_none = False
typehints_document_overloads = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # the fields of a dataclass in one list

locale_dirs = [str(HERE / "locales")]
gettext_compact = False  # one catalog a page
gettext_uuid = False

html_theme = "furo"
html_favicon = "static/favicon.svg"
html_static_path = ["static"]
templates_path = ["templates"]
html_search_scorer = str(HERE / "scorer.js")
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": ""})]
html_copy_source = False
html_show_sourcelink = False
html_use_index = False  # the search finds every name
html_domain_indices = False
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/languages.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
pygments_dark_style = "github-dark"

html_theme_options = {
    "light_css_variables": {
        "font-stack": settings.FONTS,
        "font-stack--monospace": settings.MONOSPACE,
    },
    "dark_css_variables": {"color-code-background": "#1e2124"},
    "top_of_page_buttons": [],
}

copybutton_selector = ", ".join(
    f"div.highlight-{name} > div.highlight > pre" for name in ("python", "sh")
)
codeautolink_autodoc_inject = False
codeautolink_disable_link_titles = True

site_url = settings.SITE_URL
