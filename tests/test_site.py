"""The site is built of the pages, strictly, and its reference says all there is."""

import importlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ple_jax.core.config import RULES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build_site():
    return importlib.import_module("scripts.build_site")


def test_links_out_of_the_pages_lead_to_pages_that_show_the_file(build_site):
    shown: set[str] = set()
    text = "[a](../configs/tiny.py) [b](method.md#settings) `[c](../x.md)` [d](https://e.f) ![g](images/h.svg)"
    changed = build_site.with_links(f"{text} [i](../README.md)", "docs/data.md", shown)
    assert changed == f"{text.replace('../configs/tiny.py', 'source/configs/tiny.py.md')} [i](index.md)"
    assert shown == {"configs/tiny.py"}
    assert "def get_config" in build_site.source_page("configs/tiny.py")
    assert "- `tiny.py`" in build_site.source_page("configs")


def test_formulas_are_drawn_where_they_are_no_code(build_site):
    drawn = build_site.with_formulas("$x^2$ costs $5 and $6, `$y$`\n\n$$\na\n+ b\n$$\n")
    assert drawn.startswith("<span><math") and "<msup>" in drawn and "costs $5 and $6, `$y$`" in drawn
    assert drawn.count("<math") == 2 and 'display="block"' in drawn


def test_what_a_block_needs_is_shown(build_site):
    assert build_site.with_needs("<!-- needs: two hosts -->\n```\nx\n```\n") == "*This needs two hosts.*\n\n```\nx\n```\n"


def test_the_reference_has_every_key_with_its_default_and_rule(build_site):
    page = build_site.config_page()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    assert rows.keys() == RULES.keys()
    assert "`0.2`" in rows["ple.tau_0"] and "at least 0 (inf blends every pair)" in rows["ple.tau_0"]
    assert "paper; `inf` blends" in rows["ple.tau_0"] and "looked in" not in page
    sections = re.findall(r"^## (\S+)", page, re.MULTILINE)
    assert len(sections) == len(set(sections)) and {"ple", "lora", "export"} <= set(sections)
    silent = [key for key, row in rows.items() if row.rstrip("| ").count("|") < 4 and key.endswith("kwargs") is False]
    assert "ple.tau_0" not in silent and len(silent) < len(rows) / 8  # what says nothing is named by its key


class Links(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in ("a", "img", "link", "script"):
            self.links += [value for name in ("href", "src") if (value := attributes.get(name))]
        if name := attributes.get("id"):
            self.anchors.add(name)


def read(page: Path) -> Links:
    found = Links()
    found.feed(page.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_the_site_is_built_and_its_links_lead_somewhere(build_site, capfd):
    assert build_site.main([]) == 0, capfd.readouterr()
    html = build_site.OUT / "html"
    pages = {page: read(page) for page in html.rglob("*.html")}
    assert {"index.html", "tutorial.html", "changelog.html"} <= {page.name for page in pages}
    losses = (html / "reference" / "api" / "losses.html").read_text(encoding="utf-8")
    assert "truncated_importance" in losses and "nats" in losses
    broken = []
    for page, found in pages.items():
        for link in found.links:
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or page.name == "404.html":
                assert not link.startswith("http:") or "w3.org" in link or "joschu" in link
                continue
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append((page.name, link))
    assert broken == []
    assert sum(len(found.links) for found in pages.values()) > 1000
