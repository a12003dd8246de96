"""How Sphinx builds the site from these pages and the docstrings: `make docs`."""

from __future__ import annotations

import importlib
import inspect
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.pycode import ModuleAnalyzer

import densecl_ops

REPOSITORY = "https://github.com/densecl-ops/densecl-ops"
ROOT = Path(__file__).parent.parent

project = "densecl-ops"
author = "The densecl-ops developers"
project_copyright = author
version = release = densecl_ops.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 72  # one parameter a line: a phone shows it whole
add_module_names = False

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "densecl-ops"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["notebook.ipynb"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """The lines of a documented object in the repository, at the released version."""
    if domain != "py" or not info["module"]:
        return None
    thing: Any = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        thing = getattr(thing, name, None)
    thing = inspect.unwrap(thing.fget if isinstance(thing, property) and thing.fget else thing)
    try:
        path = Path(inspect.getsourcefile(thing) or "").relative_to(ROOT)
        lines, first = inspect.getsourcelines(thing)
    except (TypeError, ValueError, OSError):
        return None
    return f"{REPOSITORY}/blob/v{release}/{path.as_posix()}#L{first}-L{first + len(lines) - 1}"


def repository_links(app: object, docname: str, source: list[str]) -> None:
    """Links that leave docs/ name files of the repository: they lead to its page on the web."""
    depth = docname.count("/") + 1
    outside = re.escape("../" * depth)
    source[0] = re.sub(rf"\]\({outside}(?!\.\./)", f"]({REPOSITORY}/blob/main/", source[0])


def show_equation(display: str) -> Callable[[Any, Any], None]:
    """MathML, which every browser draws by itself: no script and no network."""

    def visit(translator: Any, node: Any) -> None:
        mathml = convert(node.astext(), display=display)
        if "\\" in mathml or "<mi>&</mi>" in mathml:
            raise ValueError(f"latex2mathml does not know all of {node.astext()} (align* and \\operatorname it does)")
        translator.body.append(f'<div class="math">{mathml}</div>' if display == "block" else mathml)
        raise nodes.SkipNode

    return visit


def link_pictures(app: Any, page: nodes.document, name: str) -> None:
    """A wide picture is small on a phone: a touch opens it alone."""
    for picture in list(page.findall(nodes.image)):
        file = "../" * name.count("/") + "_images/" + Path(picture["uri"]).name
        if not isinstance(picture.parent, nodes.reference):
            picture.replace_self(nodes.reference("", "", picture.deepcopy(), refuri=file, internal=True))


def without_overloads(analyze: Callable[[ModuleAnalyzer], None]) -> Callable[[ModuleAnalyzer], None]:
    """One signature per function, that of the implementation: overloads are for type checkers."""

    def analyzed(self: ModuleAnalyzer) -> None:
        analyze(self)
        self.overloads = {}

    return analyzed


def pack_examples(app: Any, exception: Exception | None) -> None:
    """examples.zip beside the front page: the demo is more than one file."""
    if exception is None:
        with zipfile.ZipFile(Path(app.outdir) / "examples.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((ROOT / "docs" / "examples").rglob("*.py")):
                archive.write(path, path.relative_to(ROOT / "docs"))


def setup(app: Any) -> None:
    app.connect("source-read", repository_links)
    app.add_html_math_renderer("mathml", (show_equation("inline"), None), (show_equation("block"), None))
    app.connect("doctree-resolved", link_pictures)
    app.connect("build-finished", pack_examples)
    ModuleAnalyzer.analyze = without_overloads(ModuleAnalyzer.analyze)  # type: ignore[assignment, method-assign]
