"""Configuration of the documentation site.

    sphinx-build -W --keep-going -b html docs docs/_build/html

The pages are read on GitHub too. Therefore their links are relative to the file that holds them, and this file rewrites
them for the site. A page whose text is in another file of the repository, such as the changelog, holds an `include` of
this file.
"""

import dataclasses
import os
import re
from pathlib import Path

from sphinx.application import Sphinx
from transformers import PreTrainedConfig

import editar_hf


DOCS = Path(__file__).parent
ROOT = DOCS.parent
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)\s]+)\)")
TOCTREE = re.compile(r"^```\{toctree\}\n.*?^```\n", re.MULTILINE | re.DOTALL)

project = "editar-hf"
author = "The editar_hf contributors"
copyright = author
version = release = editar_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4
# Our docstrings name code in single backticks.
default_role = "code"
# The docstrings give the types.
autodoc_typehints = "none"
# It is slow to import, and no docstring needs it.
autodoc_mock_imports = ["gradio"]
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
copybutton_exclude = ".linenos, .gp"

html_theme = "furo"
html_title = "editar-hf"
html_copy_source = False
html_show_sphinx = False
html_extra_path = ["llms.txt"]
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_theme_options = {"light_css_variables": {"code-font-size": "80%"}}


def list_pages() -> dict[Path, str]:
    """Map the files of the repository that are pages of the site to the names of their pages."""
    pages = {}
    for file in DOCS.rglob("*.md"):
        if "_build" in file.parts:
            continue
        name = file.relative_to(DOCS).with_suffix("").as_posix()
        pages[file] = name
        for included in INCLUDE.findall(file.read_text(encoding="utf-8")):
            pages[(file.parent / included).resolve()] = name
    return pages


PAGES = list_pages()


def rewrite_links(text: str, origin: Path, page: str) -> str:
    """Rewrite the links of a file for the page that shows its text.

    A link to a file that is a page leads to this page. Sphinx copies images and other files into the site. A link to a
    folder, or to Markdown that is no page, becomes plain text with the path.
    """

    def rewrite(link: re.Match) -> str:
        path, hash_sign, anchor = link["target"].partition("#")
        if re.match(r"\w+:", path) or not path:
            return link[0]
        file = (origin.parent / path).resolve()
        if file.is_dir() or (file.suffix == ".md" and file not in PAGES):
            return f"{link['text'][1:-1]} (`{file.relative_to(ROOT).as_posix()}`)"
        target = DOCS / f"{PAGES[file]}.md" if file in PAGES else file
        return f"{link['text']}({make_relative(target, (DOCS / page).parent)}{hash_sign}{anchor})"

    return LINK.sub(rewrite, text)


def make_relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()


def read_page(page: str) -> str:
    """Read the text of a page, with included files and with the links of the site."""
    file = DOCS / f"{page}.md"

    def read_included(include: re.Match) -> str:
        origin = (file.parent / include[1]).resolve()
        text = FRONT_MATTER.sub("", origin.read_text(encoding="utf-8"))
        return rewrite_links(text, origin, page)

    own = rewrite_links(file.read_text(encoding="utf-8"), file, page)
    return INCLUDE.sub(read_included, own)


def replace_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Give Sphinx the text of a page. Record the files it comes from, so that a change of them rebuilds the page."""
    if page in PAGES.values():
        source[0] = read_page(page)
        for file, name in PAGES.items():
            if name == page:
                app.env.note_dependency(file)


def write_markdown(app: Sphinx, error: Exception | None) -> None:
    """Write each page as Markdown beside its HTML, for readers that are programs."""
    if error is not None or app.builder.name != "html":
        return
    copies = {DOCS / name: f"_images/{copy}" for name, (_, copy) in app.env.images.items()}
    copies |= {DOCS / name: f"_downloads/{copy}" for name, (_, copy) in app.env.dlfiles.items()}
    copies = {file.resolve(): Path(app.outdir) / copy for file, copy in copies.items()}
    for page in set(PAGES.values()):
        folder, place = (DOCS / page).parent, Path(app.outdir) / f"{page}.md"

        def use_copy(link: re.Match, folder: Path = folder, place: Path = place) -> str:
            """Let a link to an image or a file lead to the copy that Sphinx has made."""
            copy = copies.get((folder / link["target"]).resolve())
            return f"{link['text']}({make_relative(copy, place.parent)})" if copy else link[0]

        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(TOCTREE.sub("", LINK.sub(use_copy, read_page(page))), encoding="utf-8")


def convert_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn the Markdown of a docstring into reStructuredText, and list the options of a command line."""
    converted, is_code = [], False
    for line in lines:
        if line.lstrip().startswith("```"):
            is_code = not is_code
            indent = line[: len(line) - len(line.lstrip())]
            converted += [f"{indent}.. code-block:: python", ""] if is_code else [""]
        elif is_code:
            converted.append(f"    {line}" if line else line)
        else:
            parts = line.split("`")
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]  # Every second part is code.
            converted.append("`".join(parts))
    if help_of := read_help(obj):
        converted += ["", "Args:", *(f"    {name}: {text}" for name, text in help_of.items())]
    lines[:] = converted


def read_help(obj: object) -> dict[str, str]:
    """Read the help of each option of a command line, with the default, from the fields of its dataclass."""
    if not dataclasses.is_dataclass(obj):
        return {}
    described = {field.name: field for field in dataclasses.fields(obj) if "help" in field.metadata}
    defaults = {
        name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for name, field in described.items()
    }
    return {
        name: field.metadata["help"].replace("%%", "%")
        + ("" if defaults[name] in (None, dataclasses.MISSING) else f"; *defaults to* `{defaults[name]!r}`")
        for name, field in described.items()
    }


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Hide the fifty options of a command line, and the fields that every configuration has from transformers."""
    if read_help(obj):
        return "", None
    if what == "class" and issubclass(obj, PreTrainedConfig) and signature:
        return f"(*, {signature.partition('*, ')[2]}", returns
    return None


def setup(app: Sphinx) -> None:
    app.connect("source-read", replace_source)
    app.connect("build-finished", write_markdown)
    # Before Napoleon, which has the priority 500.
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)
    app.connect("autodoc-process-signature", shorten_signature)
