"""The documentation site: it builds without a warning, and its parts name each other completely."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


pytest.importorskip("sphinx", reason="Sphinx is not installed; install the extra `docs`.")
pytest.importorskip("myst_parser", reason="MyST is not installed; install the extra `docs`.")

ROOT = Path(__file__).parents[1]
GENERATED = {"genindex", "search", "py-modindex"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", folder / "doctrees"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    built = subprocess.run(
        [*command, "-b", "html", ROOT / "docs", folder / "html"], env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


class Page(HTMLParser):
    """The links, the anchors and the entries of the navigation of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.targets, self.anchors, self.entries, self.is_entry = set(), set(), set(), False
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "li":
            self.is_entry = (attributes.get("class") or "").startswith("toctree-l")
        if "id" in attributes:
            self.anchors.add(attributes["id"])
        if target := attributes.get("href") or attributes.get("src"):
            self.targets.add(target)
            if self.is_entry:
                self.entries.add(target)

    def handle_endtag(self, tag):
        if tag == "li":
            self.is_entry = False


def list_pages(site):
    pages = {file.relative_to(site).with_suffix("").as_posix(): Page(file) for file in site.rglob("*.html")}
    return {name: page for name, page in pages.items() if name not in GENERATED}


def test_every_internal_link_of_the_site_leads_somewhere(site):
    pages = list_pages(site)
    assert len(pages) > 30
    for name, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (site / name).parent / unquote(parts.path) if parts.path else site / f"{name}.html"
            assert file.exists(), (name, target)
            other = file.resolve().relative_to(site.resolve()).with_suffix("").as_posix()
            if parts.fragment and other in pages:
                assert unquote(parts.fragment) in pages[other].anchors, (name, target)


def test_every_page_is_in_the_navigation(site):
    expected = {f"{name}.html" for name in list_pages(site)} - {"index.html"}
    assert expected <= Page(site / "index.html").entries


def test_llms_txt_names_every_page_with_a_line(site):
    lines = re.findall(r"^- \[.+?\]\((.+?)\): .+$", (site / "llms.txt").read_text(), flags=re.MULTILINE)
    assert len(lines) == len(set(lines))
    assert {Path(line).with_suffix("").as_posix() for line in lines} == set(list_pages(site))
    assert not [line for line in lines if not (site / line).exists()]


def test_links_of_the_markdown_pages_lead_somewhere(site):
    pages = [*site.rglob("*.md")]
    assert len(pages) > 25
    for file in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)[^)\s]*\)", file.read_text()):
            assert (file.parent / target).exists(), (file.name, target)
