"""What keeps the two languages in step: one page, twice, with the same programs.

Each check takes a Chinese page and its English twin and yields what is wrong, with file and line.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import yaml

from programs import MARKDOWN, Page, read_page, whole_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from markdown_it.token import Token

CJK = re.compile(r"[\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")
CODE_SPAN = re.compile(r"(`+)[^`].*?\1")
OWN_NAME = re.compile(r"简体中文|中文")  # a language is called by its own name
# Beside Chinese punctuation CommonMark does not see bold or italics: the reader sees asterisks.
RAW_ASTERISK = re.compile(r"\*\*|\*(?=\S)|(?<=\S)\*")

# Directives whose argument is no title: it says what they draw, in both languages the same.
DRAWN = {"{picture}", "{defaults}", "{performance}", "{reliability}"}

# What is no prose in a page of the reference: directives, their options, underlines of headings.
REFERENCE = re.compile(r"^(?:\.\. .*|[ ]+:(?!description:).*|[=~^-](?=[=~^-]+$))", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A page as it stands in its file."""

    name: str  # from the root of its language, the same in both
    path: str  # as people are told
    text: str

    @classmethod
    def read(cls, path: Path, tree: Path, root: Path) -> Source:
        """Read a page of one language's ``tree``."""
        name = path.relative_to(tree).as_posix()
        return cls(name, path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))

    @cached_property
    def tokens(self) -> list[Token]:
        """The Markdown, parsed."""
        return MARKDOWN.parse(self.text)

    @cached_property
    def page(self) -> Page:
        """The fences and programs."""
        return read_page(self.text, self.path)

    @cached_property
    def front_matter(self) -> dict[str, Any]:
        """The settings at the top of the page."""
        first = self.tokens[0] if self.tokens else None
        found = yaml.safe_load(first.content) if first and first.type == "front_matter" else None
        return found if isinstance(found, dict) else {}

    @property
    def sha(self) -> str:
        """What an English page is stamped with when it translates this text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def read_pairs(root: Path) -> list[tuple[Source, Source]]:
    """Read all pages that exist in both languages."""
    zh, en = root / "docs" / "zh", root / "docs" / "en"
    names = sorted(names_in(zh) & names_in(en))
    return [
        (Source.read(zh / name, zh, root), Source.read(en / name, en, root))
        for name in names
        if name.endswith(".md")
    ]


def names_in(tree: Path) -> set[str]:
    """Return the names of all files of a language."""
    return {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}


def missing_pages(root: Path) -> Iterator[str]:
    """Every file exists in both languages."""
    zh, en = (names_in(root / "docs" / language) for language in ("zh", "en"))
    for name in sorted(zh - en):
        yield f"docs/en/{name} is missing: docs/zh/{name} has no translation"
    for name in sorted(en - zh):
        yield f"docs/zh/{name} is missing: docs/en/{name} translates nothing"


def reference_pages(root: Path) -> Iterator[str]:
    """The pages in reStructuredText, one a module, have the same targets and directives."""
    for name in sorted(names_in(root / "docs" / "zh") & names_in(root / "docs" / "en")):
        if name.endswith(".rst"):
            paths = [root / "docs" / language / name for language in ("zh", "en")]
            zh, en = (path.read_text(encoding="utf-8") for path in paths)
            if REFERENCE.findall(zh) != REFERENCE.findall(en):
                yield f"docs/zh/{name} and docs/en/{name} have other targets or directives"


def outline(source: Source) -> list[tuple[int, str, str]]:
    """Return line, kind (``h1``, ``h2``, …, ``target``) and label of headings and targets."""
    found = []
    for token in source.tokens:
        line = token.map[0] + 1 if token.map else 0
        if token.type == "heading_open":
            found.append((line, token.tag, ""))
        elif token.type == "myst_target":
            found.append((line, "target", token.content))
    return found


def headings(zh: Source, en: Source) -> Iterator[str]:
    """Both have the same sequence of heading levels and targets."""
    empty = (0, "nothing", "")
    for mine, yours in itertools.zip_longest(outline(zh), outline(en), fillvalue=empty):
        if mine[1:] != yours[1:]:
            here, there = " ".join(mine[1:]).strip(), " ".join(yours[1:]).strip()
            yield f"{zh.path}:{mine[0]} has {here}, where {en.path}:{yours[0]} has {there}"
            return  # all that follows would be told, too


def targets(zh: Source, en: Source) -> Iterator[str]:
    """Every heading has a target before it: Chinese headings get no lasting id without one."""
    for source in (zh, en):
        before = ""
        for line, kind, _ in outline(source):
            if kind != "target" and before != "target":
                yield f"{source.path}:{line}: a heading without a target: write (label)= before it"
            before = kind


def repeated_targets(pairs: list[tuple[Source, Source]]) -> Iterator[str]:
    """A target exists once in each language."""
    for sources in zip(*pairs, strict=True):
        seen: dict[str, str] = {}
        for source in sources:
            for line, kind, label in outline(source):
                where = f"{source.path}:{line}"
                if kind == "target" and label in seen:
                    yield f"{where}: the target {label} exists already at {seen[label]}"
                seen[label] = where


def fences(zh: Source, en: Source) -> Iterator[str]:
    """Both have the same fences in the same order."""
    empty = None
    for mine, yours in itertools.zip_longest(zh.page.blocks, en.page.blocks, fillvalue=empty):
        here = comparable(mine.language) if mine else "no more fence"
        there = comparable(yours.language) if yours else "no more fence"
        if here != there:
            lines = [block.lines[0] + 1 if block else "end" for block in (mine, yours)]
            yield f"{zh.path}:{lines[0]} has {here}, where {en.path}:{lines[1]} has {there}"
            return


def comparable(info: str) -> str:
    """Return a fence's name and what stands behind it; of a title, nothing."""
    name, _, argument = info.partition(" ")
    return info if name in DRAWN or not argument else name


def programs(zh: Source, en: Source) -> Iterator[str]:
    """Both have the same programs, but for words."""
    for mine, yours in zip(zh.page.programs, en.page.programs, strict=False):
        here, there = wordless(mine.code.content), wordless(yours.code.content)
        for line, other in itertools.zip_longest(here, there, fillvalue="(the end)"):
            if line != other:
                where = f"{zh.path}:{mine.line} and {en.path}:{yours.line}"
                yield f"{where}: the programs differ:\n    zh: {line}\n    en: {other}"
                break


def wordless(source: str) -> list[str]:
    """Return a program's lines without comments, docstrings and the words in strings."""
    try:
        return ast.unparse(Wordless().visit(ast.parse(source))).splitlines()
    except SyntaxError:  # told when it is run
        return source.splitlines()


class Wordless(ast.NodeTransformer):
    """Takes the words out of a program."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Drop docstrings."""
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
        return super().generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        """Blank a string."""
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.JoinedStr:
        """Keep what an f-string computes, and how it is formatted."""
        values = [part for part in node.values if isinstance(part, ast.FormattedValue)]
        for part in values:
            part.value = self.visit(part.value)
        return ast.JoinedStr(values)


def staleness(zh: Source, en: Source) -> Iterator[str]:
    """The English page says which Chinese text it translates, and that is today's text."""
    stamp = en.front_matter.get("translation")
    command = f"tox exec -e docs -- python tests/docs/stamp.py {en.path}"
    if not isinstance(stamp, dict) or stamp.get("of") != zh.name:
        yield f"{en.path}: does not say that it translates {zh.name}: {command}"
    elif str(stamp.get("sha")) != zh.sha:
        yield f"{en.path} is stale: {zh.path} has changed; bring it up to date, then {command}"


def descriptions(zh: Source, en: Source) -> Iterator[str]:
    """Every page has a description for search engines."""
    for source in (zh, en):
        front = source.front_matter
        meta = front.get("html_meta") or (front.get("myst") or {}).get("html_meta") or {}
        if not meta.get("description"):
            yield f"{source.path}:1: no description: write html_meta: description: in front"


def raw_asterisks(zh: Source, en: Source) -> Iterator[str]:
    """No asterisk of a failed bold or italics is shown."""
    for source in (zh, en):
        for token in source.tokens:
            text = "".join(part.content for part in token.children or () if part.type == "text")
            if RAW_ASTERISK.search(text):
                line = token.map[0] + 1 if token.map else 0
                yield f"{source.path}:{line}: the reader sees an asterisk: {text}"


def chinese_in_english(_: Source, en: Source) -> Iterator[str]:
    """An English page has Chinese in code spans and in the terms of the glossary only."""
    for number, line in enumerate(whole_lines(en.text), start=1):
        words = OWN_NAME.sub("", CODE_SPAN.sub("", line))
        in_glossary = en.name == "glossary.md" and (line.startswith("|") or " · " in line)
        if CJK.search(words) and not in_glossary:
            yield f"{en.path}:{number}: Chinese in an English page: {line.strip()}"


CHECKS = [
    headings,
    targets,
    fences,
    programs,
    staleness,
    descriptions,
    raw_asterisks,
    chinese_in_english,
]
README_CHECKS = [headings, fences, programs, raw_asterisks, chinese_in_english]
