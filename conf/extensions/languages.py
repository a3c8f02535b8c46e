"""Two sites that know each other, and a theme that speaks the reader's language.

Every page gets a link to itself in the other language, ``hreflang`` alternates, and the theme's
hard-coded English labels in the language of the page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sphinx.util import logging

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.config import Config

logger = logging.getLogger(__name__)


class Language(NamedTuple):
    """One of the site's languages."""

    folder: str
    tag: str
    name: str
    short: str
    title: str
    labels: dict[str, str]


# What Furo writes into its pages without asking the catalog. The keys are found in every page,
# or `localize` warns: a new version of the theme has changed them.
NAVIGATION = 'aria-label="Toggle site navigation sidebar"'
CONTENTS = 'aria-label="Toggle table of contents sidebar"'
THEME = 'aria-label="Toggle Light / Dark / Auto color theme"'
ASIDES = {
    "zh": {
        '<aside class="sidebar-drawer"': '<aside aria-label="全书目录" class="sidebar-drawer"',
        '<aside class="toc-drawer': '<aside aria-label="本页目录" class="toc-drawer',
    },
    "en": {
        '<aside class="sidebar-drawer"': '<aside aria-label="All pages" class="sidebar-drawer"',
        '<aside class="toc-drawer': '<aside aria-label="On this page" class="toc-drawer',
    },
}
LANGUAGES = {
    "zh_CN": Language(
        folder="zh",
        tag="zh-CN",
        name="简体中文",
        short="中文",
        title="Python 并发模式",
        labels={
            **ASIDES["zh"],
            NAVIGATION: 'aria-label="打开或收起全书目录"',
            CONTENTS: 'aria-label="打开或收起本页目录"',
            THEME: 'aria-label="切换浅色、深色或跟随系统的配色"',
            "<title>Contents</title>": "<title>目录</title>",
            "<title>Menu</title>": "<title>菜单</title>",
            "<title>Expand</title>": "<title>展开</title>",
            "<title>Light mode</title>": "<title>浅色</title>",
            "<title>Dark mode</title>": "<title>深色</title>",
            "<title>Auto light/dark, in light mode</title>": "<title>跟随系统，现为浅色</title>",
            "<title>Auto light/dark, in dark mode</title>": "<title>跟随系统，现为深色</title>",
            "@pradyunsg</a>'s": "@pradyunsg</a> 的",
            '/furo">Furo</a>': '/furo">Furo</a> 生成',
        },
    ),
    "en": Language(
        folder="en",
        tag="en",
        name="English",
        short="EN",
        title="Concurrency patterns for Python",
        labels=ASIDES["en"],
    ),
}
GENERATED = ("search", "_modules/")  # pages without a source of their own


def set_texts(app: Sphinx, config: Config) -> None:
    """Set what depends on the language; ``-D language`` is known only after conf.py has run."""
    here = LANGUAGES[config.language]
    config.html_title = here.title
    config.html_baseurl = f"{config.site_url}{here.folder}/"


def check_pairs(app: Sphinx) -> None:
    """Warn about a page that only one language has."""
    docs = Path(app.srcdir).parent
    if {path.name for path in docs.iterdir()} < {"zh", "en"}:
        return  # a tree with one language, as tests build it
    pages = {folder: pages_of(docs / folder) for folder in ("zh", "en")}
    for folder, other in (("zh", "en"), ("en", "zh")):
        for name in sorted(pages[folder] - pages[other]):
            logger.warning("docs/%s/%s has no twin in docs/%s", folder, name, other)


def pages_of(folder: Path) -> set[str]:
    """Return the names of the pages in a tree, without their suffix."""
    found = [*folder.rglob("*.md"), *folder.rglob("*.rst")]
    return {path.relative_to(folder).with_suffix("").as_posix() for path in found}


def add_context(
    app: Sphinx,
    pagename: str,
    templatename: str,
    context: dict[str, Any],
    doctree: nodes.document | None,
) -> None:
    """Give the templates the alternates of this page, and the means to translate the theme."""
    here = LANGUAGES[app.config.language]
    docs = Path(app.srcdir).parent
    up = "../" * (pagename.count("/") + 1)
    uri = app.builder.get_target_uri(pagename)
    alternates = []
    for language in LANGUAGES.values():
        exists = pagename.startswith(GENERATED) or any(
            (docs / language.folder / f"{pagename}{suffix}").exists()
            for suffix in app.config.source_suffix
        )
        href = uri if exists else "index.html"
        alternates.append(
            {
                "tag": language.tag,
                "name": language.name,
                "short": language.short,
                "href": f"{up}{language.folder}/{href}",
                "absolute": f"{app.config.site_url}{language.folder}/{uri}" if exists else None,
                "current": language is here,
            }
        )
    context["alternates"] = alternates
    context["other_language"] = next(a for a in alternates if not a["current"])
    context["site_url"] = app.config.site_url
    context["localize"] = lambda html: localize(html, here, pagename)
    if context.get("body"):
        context["body"] = make_accessible(context["body"])
    if doctree is None:
        add_description(context, here)


def add_description(context: dict[str, Any], here: Language) -> None:
    """Describe a generated page; the others have a description in their front matter."""
    text = f"{context.get('title') or ''} - {here.title}".strip(" -")
    context["metatags"] = (
        context.get("metatags", "") + f'\n<meta name="description" content="{text}">'
    )


def localize(html: str, here: Language, pagename: str) -> str:
    """Replace the labels that Furo hard-codes."""
    for old, new in here.labels.items():
        if old not in html:
            logger.warning(
                "Furo does not say %r any more; see languages.py", old, location=pagename
            )
        html = html.replace(old, new)
    # Sphinx makes a caption of the contents a heading, and forgets its level.
    html = html.replace(
        'class="caption" role="heading">', 'class="caption" role="heading" aria-level="2">'
    )
    if here.folder == "zh":
        html = html.replace('aria-label="Toggle navigation of ', 'aria-label="展开或收起：')
    return html


def make_accessible(body: str) -> str:
    """Let the keyboard reach what scrolls sideways: code, and wide tables.

    The empty corner of a table is no heading.
    """
    body = re.sub(r'<th class="head">\s*(<p>\s*</p>)?\s*</th>', '<td class="head"></td>', body)
    body = re.sub(r"(<div class=\"highlight\"><pre)>", r'\1 tabindex="0">', body)
    return body.replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the parts."""
    app.add_config_value("site_url", "/", "html")
    app.connect("config-inited", set_texts)
    app.connect("builder-inited", check_pairs)
    app.connect("html-page-context", add_context)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
