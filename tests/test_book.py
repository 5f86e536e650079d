"""The built book: complete, readable by everyone, and opening from the file system with no network."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml

bs4 = pytest.importorskip("bs4", reason='the book is not installed: pip install -e ".[book,test]"')
playwright = pytest.importorskip("playwright.sync_api", reason='playwright is missing: pip install -e ".[test]"')

ROOT = Path(__file__).parents[1]
HTML = ROOT / "build" / "html"
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
LISTED = [TOC["root"]] + [page["file"] for part in TOC["parts"] for page in part["chapters"]]
CHAPTERS = [name for name in LISTED if name.startswith("notebooks/")]
WIDTHS = {"desktop": 1280, "phone": 390}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LOADS = dict.fromkeys(("script", "img", "iframe", "source", "video", "audio", "embed", "input"), "src")
LOADS |= {"link": "href", "use": "href", "image": "href", "object": "data"}

Soups = dict[Path, "bs4.BeautifulSoup"]


@pytest.fixture(scope="module")
def pages() -> Soups:
    """Every page of the book, parsed; the theme's own templates are left out."""
    if not (HTML / "index.html").is_file():
        pytest.skip("build/html is absent: run make book first")
    found = sorted(p for p in HTML.rglob("*.html") if "_static" not in p.relative_to(HTML).parts)
    return {p: bs4.BeautifulSoup(p.read_text("utf-8"), "html.parser") for p in found}


@pytest.fixture(scope="module")
def chapters(pages: Soups) -> Soups:
    return {p: pages[p] for p in (HTML / f"{name}.html" for name in CHAPTERS)}


@pytest.fixture(scope="module")
def mathml() -> ModuleType:
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("book_mathml", ROOT / "book" / "_ext" / "mathml.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outside(url: str) -> bool:
    """Whether a URL leads off this computer."""
    parts = urlsplit(url.strip())
    return bool(parts.netloc) or parts.scheme not in ("", "data", "file")


def name(page: Path) -> str:
    return str(page.relative_to(HTML))


# The formulas


@pytest.mark.parametrize(
    ("latex", "part"),
    [
        (r"\frac{a}{b}", "<mfrac>"),
        (r"\lVert x \rVert_2", '<mo stretchy="false">'),
        (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "<mtable"),
        (r"\operatorname{softmax}(QK^\top)", "softmax"),
        (r"\mathbb{R}^{n \times d}", "<msup>"),
    ],
)
def test_formula_becomes_mathml(mathml: ModuleType, latex: str, part: str) -> None:
    markup = mathml.mathml(latex, "block")
    assert markup.startswith("<math")
    assert part in markup


@pytest.mark.parametrize("latex", [r"\nonsense x", r"x_{", r"a & b"])
def test_formula_that_cannot_be_said_is_refused(mathml: ModuleType, latex: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        mathml.mathml(latex, "inline")


# The pages as files


def test_every_listed_page_is_built(pages: Soups) -> None:
    missing = [n for n in [*LISTED, "index", "search", "genindex"] if HTML / f"{n}.html" not in pages]
    assert not missing


def test_nothing_is_loaded_from_a_network(pages: Soups) -> None:
    urls = [(name(p), t.name, t.get(LOADS[t.name]) or "") for p, soup in pages.items() for t in soup(list(LOADS))]
    sets = [(name(p), t) for p, soup in pages.items() for t in soup(srcset=True)]
    urls += [(page, t.name, choice.split()[0]) for page, t in sets for choice in t["srcset"].split(",")]
    for sheet in HTML.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", sheet.read_text("utf-8"), flags=re.DOTALL)
        urls += [(name(sheet), "css", u) for u in re.findall(r"url\(\s*['\"]?([^'\")]+)", text)]
        urls += [(name(sheet), "css", u) for u in re.findall(r"@import\s+['\"]([^'\"]+)", text)]
    assert len(urls) > len(pages)
    assert [u for u in urls if outside(u[2])] == []


def test_every_local_link_leads_somewhere(pages: Soups) -> None:
    anchors = {p: {t.get(key) for key in ("id", "name") for t in soup(True)} for p, soup in pages.items()}
    broken = []
    for page, soup in pages.items():
        for tag in soup(lambda t: t.get("href") or t.get("src")):
            url = tag.get("href") or tag.get("src")
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            known = anchors.get(target)
            lost = known is not None and parts.fragment and unquote(parts.fragment) not in known
            if not target.exists() or lost:
                broken.append((name(page), url))
    assert broken == []


def test_every_image_has_a_caption(pages: Soups) -> None:
    images = [(name(p), i.get("src", ""), (i.get("alt") or "").strip()) for p, s in pages.items() for i in s("img")]
    assert images
    # Sphinx fills a missing text with the file's name
    assert [p for p in images if not p[2] or re.search(r"\.(png|svg|jpe?g|gif)$|_images/", p[2])] == []


def test_every_figure_of_a_chapter_is_numbered_and_captioned(chapters: Soups) -> None:
    for page, soup in chapters.items():
        images = soup.select(".bd-article img")
        assert images, f"{name(page)} has no figure"
        for image in images:
            figure = image.find_parent("figure")
            assert figure is not None, f"{name(page)}: {image['src']} is not a figure"
            assert re.match(r"Fig\. \d", figure.select_one("figcaption .caption-number").get_text())
            assert len(figure.select_one("figcaption .caption-text").get_text(" ", strip=True)) > 20


def test_no_reference_is_left_open(pages: Soups) -> None:
    text = {name(p): s.select_one(".bd-article") for p, s in pages.items()}
    raw = r"\{(?:term|cite:?\w?|numref|ref|doc|eq)\}`|Fig\. \?|\[\?\]"
    assert [(n, m[0]) for n, t in text.items() if t and (m := re.search(raw, t.get_text()))] == []


def test_formulas_are_mathml_without_scripts(pages: Soups) -> None:
    scripts = [s.get("src", "") + s.get_text() for soup in pages.values() for s in soup("script")]
    assert [s[:80] for s in scripts if re.search("mathjax|katex|require(?:js|.min)|thebe", s, re.IGNORECASE)] == []
    formulas = [f for soup in pages.values() for f in soup.select(".math")]
    assert formulas
    assert [str(f)[:120] for f in formulas if f.find("math") is None] == []


def test_every_chapter_can_be_downloaded_as_a_notebook(chapters: Soups) -> None:
    for page, soup in chapters.items():
        link = soup.select_one("a.btn-download-source-button")
        assert link is not None, f"{name(page)} has no download button"
        notebook = nbformat.read(page.parent / link["href"], as_version=4)
        nbformat.validate(notebook)
        assert link["href"].endswith(".ipynb")
        assert notebook.metadata.kernelspec.name == "python3"
        assert any(cell.get("outputs") for cell in notebook.cells)


def test_every_chapter_tells_where_its_numbers_come_from(chapters: Soups) -> None:
    assert [name(p) for p, soup in chapters.items() if not soup.select("details.provenance")] == []


# The pages in a browser


class Ear:
    """What a browser complains of, and what it asks for."""

    def __init__(self, context: "playwright.BrowserContext") -> None:
        self.heard: list[str] = []
        context.on("console", lambda m: self.heard.append(f"console: {m.text}") if m.type == "error" else None)
        context.on("weberror", lambda e: self.heard.append(f"error: {e.error}"))
        context.on("requestfailed", self.failed)
        context.on("request", lambda r: self.heard.append(f"request: {r.url}") if outside(r.url) else None)

    def failed(self, request: "playwright.Request") -> None:
        """Leaving a page (the front page redirects) cancels what it still loads: no failure if that file is there."""
        cancelled = request.failure == "net::ERR_ABORTED" and Path(unquote(urlsplit(request.url).path)).is_file()
        if not cancelled:
            self.heard.append(f"failed: {request.url} {request.failure}")


@pytest.fixture(scope="module")
def browser(pages: Soups) -> Iterator["playwright.Browser"]:
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with playwright.sync_playwright() as driver:
        if path is None and Path(driver.chromium.executable_path).exists():
            path = driver.chromium.executable_path
        if path is None:
            pytest.skip(f"no Chromium found: looked for {', '.join(CHROMIUM)} and for playwright's own")
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = driver.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: "playwright.Browser") -> Iterator["playwright.BrowserContext"]:
    """A fresh reader: no network, a light desktop, no stored settings."""
    fresh = browser.new_context(viewport={"width": WIDTHS["desktop"], "height": 900}, offline=True)
    yield fresh
    fresh.close()


def open_page(tab: "playwright.Page", path: Path) -> None:
    tab.goto(path.as_uri(), wait_until="load")
    if path == HTML / "index.html":
        tab.wait_for_url("**/book/index.html")
    tab.wait_for_load_state("networkidle")


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_page_opens_in_silence_and_fits(context: "playwright.BrowserContext", pages: Soups, width: int) -> None:
    ear, tab = Ear(context), context.new_page()
    tab.set_viewport_size({"width": width, "height": 900})
    wide = []
    for page in pages:
        open_page(tab, page)
        tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        shown, available = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        if shown > available + 1:
            wide.append((name(page), shown, available))
    tab.wait_for_timeout(200)  # late complaints
    assert ear.heard == []
    assert wide == []


@pytest.mark.browser
def test_dark_mode_keeps_figures_readable(context: "playwright.BrowserContext", chapters: Soups) -> None:
    tab = context.new_page()
    first, second = list(chapters)[:2]
    open_page(tab, first)
    theme, card = "document.documentElement.dataset.theme", ".bd-article figure img"
    assert tab.evaluate(theme) == "light"
    for _ in range(3):  # the switch goes round: light, dark, as the system
        if tab.evaluate(theme) != "dark":
            tab.locator(".theme-switch-button:visible").first.click()
    assert tab.evaluate(theme) == "dark"
    open_page(tab, second)
    assert tab.evaluate(theme) == "dark", "the choice is not remembered"
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60
    look = "i => [getComputedStyle(i).backgroundColor, getComputedStyle(i).filter]"
    assert tab.locator(card).first.evaluate(look) == ["rgb(255, 255, 255)", "none"]


@pytest.mark.browser
def test_search_finds_a_word(context: "playwright.BrowserContext") -> None:
    ear, tab = Ear(context), context.new_page()
    open_page(tab, HTML / "book" / "index.html")
    tab.keyboard.press("Control+k")
    tab.locator("input[type=search]:visible").first.fill("register")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html?q=register*")
    results = tab.locator("#search-results ul.search li a")
    results.first.wait_for(timeout=10_000)
    found = {Path(unquote(urlsplit(a.evaluate("a => a.href")).path)) for a in results.all()}
    assert HTML / "book" / "glossary.html" in found
    assert [p for p in found if not p.is_file()] == []
    assert ear.heard == []


@pytest.mark.browser
def test_solutions_stay_folded_until_asked_for(context: "playwright.BrowserContext", chapters: Soups) -> None:
    tab = context.new_page()
    folded = [p for p, soup in chapters.items() if soup.select(".admonition.dropdown")]
    assert folded, "no chapter has a folded solution"
    open_page(tab, folded[0])
    box = tab.locator(".admonition.dropdown").first
    text = box.locator("> :not(.admonition-title):not(button)").first
    assert not text.is_visible()
    box.locator(".admonition-title").click()
    text.wait_for(state="visible", timeout=5_000)
    assert text.is_visible()
