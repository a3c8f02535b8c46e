"""The built site as a reader meets it, in a browser."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import threading
from contextlib import suppress
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, BrowserContext, Page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_playwright = pytest.importorskip("axe_playwright_python.sync_playwright")

ROOT = Path(__file__).parent.parent.parent
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
HEAVIEST = 60_000
SEARCHES = {
    "zh": {
        "令牌桶": "rate-limiting",
        "快速失败": "best-practices",
        "指数退避": "retry",
        "优雅降级": "fallback",
        "熔断器": "circuit-breaker",
        "生产者": "producer-consumer",
        "工作池": "worker-pool",
        "背压": "producer-consumer",
        "截止时间": "timeout-cancellation",
        "可观测性": "observability",
    },
    "en": {
        "token bucket": "rate-limiting",
        "circuit breaker": "circuit-breaker",
        "backpressure": "producer-consumer",
    },
}
# Names, which are the same in every language.
NAMES = {"API", "English", "Furo", "PEP", "Python", "Sphinx", "pradyunsg"}
AUTHORS = "The concurrency-patterns authors"

# Every token of a program in a colour of its own is checked by axe; once for each is enough.
TOKENS_ONCE = """() => {
    const seen = new Set();
    for (const token of document.querySelectorAll("pre span[class]")) {
        const kind = token.closest("[class^=highlight-]")?.className + token.className;
        if (seen.has(kind)) token.replaceWith(...token.childNodes);
        seen.add(kind);
    }
}"""

# Only colours are other in the dark.
RULES: dict[str, Any] = {
    "light": {"resultTypes": ["violations"]},
    "dark": {
        "resultTypes": ["violations"],
        "runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]},
    },
}


class Handler(SimpleHTTPRequestHandler):
    """Serve the site as GitHub Pages does: what is missing gets 404.html."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send the site's own page."""
        body = Path(self.directory, "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file; a browser that has moved on does not want the rest of it."""
        with suppress(BrokenPipeError, ConnectionResetError):
            super().copyfile(source, outputfile)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Head(HTMLParser):
    """The tags of a page and their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag."""
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def of(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of all tags of this kind."""
        return [attributes for name, attributes in self.tags if name == tag]


def built(config: pytest.Config) -> Path:
    """Return where the site was built."""
    return ROOT / (config.getoption("--site", default=None) or "build/html")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each page."""
    if "name" in metafunc.fixturenames:
        site = built(metafunc.config)
        names = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
        metafunc.parametrize("name", names, scope="module")


@pytest.fixture(scope="module")
def site(pytestconfig: pytest.Config) -> Path:
    """Return the folder of the built site."""
    folder = built(pytestconfig)
    if not (folder / "index.html").exists():
        missing = f"no site in {folder}: run `tox -e docs` first"
        (pytest.fail if pytestconfig.getoption("--site", default=None) else pytest.skip)(missing)
    return folder


@pytest.fixture(scope="module")
def browser(pytestconfig: pytest.Config, site: Path) -> Iterator[Browser]:
    """Start one browser for all tests."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        missing = "no Chromium is installed (apt-get install chromium, or set CHROMIUM)"
        (pytest.fail if pytestconfig.getoption("--site", default=None) else pytest.skip)(missing)
    with playwright.sync_playwright() as play:
        # A container has no other sandbox to start one in; only our own pages are opened.
        started = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Serve the site on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Open the browser of a Chinese reader."""
    with browser.new_context(
        locale="zh-CN", viewport=DESKTOP, reduced_motion="reduce", color_scheme="light"
    ) as opened:
        opened.grant_permissions(["clipboard-read", "clipboard-write"])
        yield opened


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """Open a tab."""
    tab = context.new_page()
    yield tab
    tab.close()


class Visit:
    """A page of the site that is open, and what it asked for and complained about."""

    def __init__(self, tab: Page, address: str, name: str) -> None:
        self.name = name
        self.page = tab
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        tab.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        tab.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        tab.on("pageerror", lambda error: self.errors.append(str(error)))
        tab.goto(address + name)


@pytest.fixture(scope="module")
def visit(context: BrowserContext, site: Path, address: str, name: str) -> Iterator[Visit]:
    """Open a page once for all tests that look at every page."""
    tab = context.new_page()
    if name == "index.html":  # it would lead away
        html = (site / name).read_text(encoding="utf-8")
        stays = html.replace("location.replace", "void ")
        tab.route(address + name, lambda route: route.fulfill(body=stays, content_type="text/html"))
    yield Visit(tab, address, name)
    tab.close()


def test_a_page_is_light(site: Path, name: str) -> None:
    """A page weighs less than 60 kB with its styles and scripts, packed as servers do."""
    html = (site / name).read_text(encoding="utf-8")
    parts = [html.encode()]
    for link in re.findall(r'<(?:link|script)[^>]*? (?:href|src)="([^"]+)"', html):
        path = (site / name).parent / unquote(link.split("?")[0])
        # The index of the search is loaded by its own page alone; it is the book, not the page.
        if path.suffix in {".css", ".js"} and path.name != "searchindex.js":
            parts.append(path.resolve().read_bytes())
    assert sum(len(gzip.compress(part, 9)) for part in parts) < HEAVIEST


def test_a_page_tells_what_it_is(site: Path, name: str) -> None:
    """Every page has a title, a description, a language, and links to its twin."""
    head = Head((site / name).read_text(encoding="utf-8"))
    assert head.of("html")[0]["lang"] == ("en" if name.startswith("en/") else "zh-CN")
    descriptions = [meta for meta in head.of("meta") if meta.get("name") == "description"]
    assert len(descriptions) == 1
    assert descriptions[0]["content"]
    if name in {"index.html", "404.html"}:
        return
    links = {(link["rel"], link.get("hreflang")): link["href"] for link in head.of("link")}
    page = name.split("/", 1)[1]
    assert links["canonical", None].endswith(f"/{name}")
    assert links["alternate", "zh-CN"].endswith(f"/zh/{page}")
    assert links["alternate", "en"].endswith(f"/en/{page}")
    assert (site / "zh" / page).exists()
    assert (site / "en" / page).exists()


def test_no_markup_is_left(visit: Visit) -> None:
    """No asterisks of Markdown, and no stray blank between two Chinese characters, are shown."""
    prose: str = visit.page.evaluate(
        """() => [...document.querySelectorAll("article p, article li, article td, article h2")]
        .filter((e) => !e.closest(".sig, dl.py, pre") && !e.querySelector("p, li, td")).map((e) => {
            const copy = e.cloneNode(true);
            copy.querySelectorAll("code, pre, .sig").forEach((c) => c.replaceWith("x"));
            return copy.textContent;
        }).join("\\n\\n")"""
    )
    assert "**" not in prose
    assert not re.findall(r"[\u4e00-\u9fff][ \t]?\n[\u4e00-\u9fff]", prose)


def test_the_chinese_site_speaks_chinese(visit: Visit) -> None:
    """Nothing around the article of a Chinese page is in English."""
    if not visit.name.startswith("zh/"):
        pytest.skip("not a Chinese page")
    said: list[str] = visit.page.evaluate(
        """() => {
        const attributes = ["aria-label", "title", "placeholder", "alt", "data-tooltip"];
        const named = (e) => e.closest("figure, a.reference");
        const all = [...document.body.querySelectorAll("*")].filter((e) => !named(e));
        const labels = all.flatMap((e) => attributes.map((a) => e.getAttribute(a)));
        const titles = [...document.querySelectorAll("svg title")].map((e) => e.textContent);
        const copy = document.body.cloneNode(true);
        const others = "article, script, style, svg, .sidebar-tree, .toc-tree, .title, noscript";
        copy.querySelectorAll(others).forEach((e) => e.remove());
        return [...labels, ...titles, copy.textContent].filter(Boolean);
        }"""
    )
    words = re.findall(r"[A-Za-z]{3,}", " ".join(said).replace(AUTHORS, ""))
    assert set(words) <= NAMES


def test_copying_gives_the_program(visit: Visit) -> None:
    """The button copies exactly what stands in the source, and outputs have no button."""
    source = (ROOT / "docs" / visit.name).with_suffix(".md")
    if not source.exists():
        pytest.skip("no page of prose")
    text = source.read_text(encoding="utf-8")
    programs = re.findall(r"^```(?:python|sh)\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    if not programs:
        pytest.skip("no program on this page")
    page = visit.page
    page.locator("button.copybtn").first.wait_for(state="attached")
    buttons = page.locator("button.copybtn")
    assert buttons.count() == len(programs)
    assert page.locator(".highlight-output button").count() == 0
    for i, program in enumerate(programs):
        buttons.nth(i).dispatch_event("click")
        assert page.evaluate("navigator.clipboard.readText()").rstrip("\n") == program.rstrip("\n")


def test_a_page_is_for_everybody(visit: Visit) -> None:
    """axe-core finds nothing: light and dark, on a desktop and on a phone."""
    page = visit.page
    page.evaluate(TOKENS_ONCE)
    page.evaluate(axe_playwright.Axe().axe_script)
    found = {}
    for width in (DESKTOP, PHONE):
        page.set_viewport_size(width)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            result = page.evaluate("(rules) => axe.run({...rules, preload: false})", RULES[scheme])
            for fault in result["violations"]:
                places = [node["html"][:200] for node in fault["nodes"][:3]]
                found[f"{fault['id']} ({scheme}, {width['width']} px)"] = places
    assert not found


def test_a_page_keeps_to_itself(visit: Visit, address: str) -> None:
    """No page asks another host for anything, or leaves an error in the console."""
    assert not visit.errors
    assert visit.hosts - {""} == {urlsplit(address).netloc}


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_switcher_keeps_the_place(page: Page, address: str, size: dict[str, int]) -> None:
    """The other language opens on the same page, at the same heading."""
    page.set_viewport_size(size)
    page.goto(f"{address}zh/rate-limiting.html#token-bucket")
    page.locator("a.language-switch[hreflang=en]:visible").first.click()
    assert page.url == f"{address}en/rate-limiting.html#token-bucket"
    page.locator("a.language-switch[hreflang=zh-CN]:visible").first.click()
    assert page.url == f"{address}zh/rate-limiting.html#token-bucket"
    assert page.evaluate("document.querySelector(location.hash) !== null")


def test_the_switcher_keeps_the_query(page: Page, address: str) -> None:
    """A search goes on in the other language."""
    page.goto(f"{address}zh/search.html?q=asyncio")
    page.locator("a.language-switch[hreflang=en]:visible").first.click()
    assert page.url == f"{address}en/search.html?q=asyncio"


@pytest.mark.parametrize(
    ("language", "query", "right"),
    [(folder, *pair) for folder, pairs in SEARCHES.items() for pair in pairs.items()],
)
def test_the_search_finds(page: Page, address: str, language: str, query: str, right: str) -> None:
    """The page that explains the words is found first or second."""
    page.goto(f"{address}{language}/index.html")
    page.locator("input.sidebar-search").fill(query)
    page.locator("input.sidebar-search").press("Enter")
    page.locator("#search-results li a").first.wait_for()
    page.wait_for_function("Search._pulse_status < 0 && Search.status.innerText !== ''")
    links = page.locator("#search-results ul.search > li > a")
    urls = links.evaluate_all("all => all.map((a) => a.href)")
    pages = list(dict.fromkeys(urlsplit(url).path for url in urls))
    assert f"/{language}/{right}.html" in pages[:2]


@pytest.mark.parametrize(
    ("locale", "folder"), [("zh-CN", "zh"), ("zh-TW", "zh"), ("en-GB", "en"), ("fr-FR", "en")]
)
def test_the_root_page_chooses(browser: Browser, address: str, locale: str, folder: str) -> None:
    """Each reader lands in the language of the browser."""
    with browser.new_context(locale=locale) as context:
        page = context.new_page()
        page.goto(address)
        page.wait_for_url(f"{address}{folder}/index.html")


def test_the_root_page_remembers(browser: Browser, address: str) -> None:
    """Who has chosen a language gets it the next time."""
    with browser.new_context(locale="zh-CN") as context:
        page = context.new_page()
        page.goto(f"{address}zh/index.html")
        page.locator("a.language-switch[hreflang=en]:visible").first.click()
        page.goto(address)
        page.wait_for_url(f"{address}en/index.html")


@pytest.mark.parametrize(("text", "folder"), [("简体中文", "zh"), ("English", "en")])
def test_the_root_page_without_scripts(
    browser: Browser, address: str, text: str, folder: str
) -> None:
    """Both languages are plain links."""
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(address)
        page.get_by_role("link", name=text).click()
        assert page.url == f"{address}{folder}/index.html"


def test_a_missing_page_shows_the_way(context: BrowserContext, address: str) -> None:
    """The page for what is missing leads back, in the language that was being read."""
    page: Any = context.new_page()
    assert page.goto(f"{address}en/nothing/here.html").status == 404
    assert page.locator("h2").first.inner_text() == "There is no such page"
    page.get_by_role("link", name="first page").click()
    assert page.url == f"{address}en/index.html"
    page.close()
