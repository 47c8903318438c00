"""The documentation site: `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import functools
import pkgutil
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import trpo_optim

project = "trpo_optim"
author = "The authors of trpo_optim"
copyright = author
release = version = trpo_optim.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"trpo_optim {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": "https://github.com/trpo-optim/trpo_optim/",
    "source_branch": "main",
    "source_directory": "docs/",
}

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True


@functools.cache
def docs_of_data() -> dict[str, list[str]]:
    """Return the strings under the package's module-level assignments, by name."""
    modules = pkgutil.walk_packages(trpo_optim.__path__, "trpo_optim.")
    found: dict[str, list[str]] = {}
    for module in modules:
        if not module.name.endswith("__main__"):
            for (scope, name), lines in (
                ModuleAnalyzer.for_module(module.name).find_attr_docs().items()
            ):
                if not scope:
                    found[name] = lines
    return found


def document_data(*event: Any) -> None:
    """Give a re-exported constant its own docstring; autodoc shows that of its type."""
    _app, what, name, _value, _options, lines = event
    if what == "data":
        lines[:] = docs_of_data()[name.rpartition(".")[2]]


def setup(app: Sphinx) -> None:
    """Connect the above, before Google-style sections are read."""
    app.connect("autodoc-process-docstring", document_data, priority=400)
