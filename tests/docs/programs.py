"""Find the programs of a page: each ``python`` block, with the ``output`` block that follows it.

Sybil passes silently over Python that it does not know as such, and a reader cannot tell. So
whatever looks like Python and is no ``python`` block is a fault of the page, told by its line.
"""

from __future__ import annotations

import ast
import itertools
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from mdit_py_plugins.deflist import deflist_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from markdown_it.token import Token

MARKDOWN = (
    MarkdownIt("commonmark")
    .enable("table")
    .use(front_matter_plugin)
    .use(myst_block_plugin)
    .use(deflist_plugin)
)

# The reader sees why: "Not run: it needs a network." or, in Chinese, "不运行：要连外网。"
NOT_RUN = re.compile(r"^(?:Not run|不运行)[:：][ \t]*(.*)$", re.MULTILINE)
SEPARATE_PROCESS = re.compile(
    r"""
    ^if\ __name__\ ==
    | ^\s*(?:import|from)\ +(?:multiprocessing|threading|subprocess|signal|concurrent)\b
    | \b(?:to_thread|run_in_executor|process_pool|ProcessPool|start_server)\b
    """,
    re.MULTILINE | re.VERBOSE,
)

PYTHON_NAME = re.compile(r"(?:i?py|python|cython|sage|numpy|xonsh)", re.IGNORECASE)
CODE_DIRECTIVE = r"(?:code|code-block|sourcecode|code-cell|doctest|testcode|literalinclude|ipython)"
BACKTICK_CODE = re.compile(rf"\{{{CODE_DIRECTIVE}\}}")
COLON_CODE = re.compile(rf"\s*:{{3,}}\s*(?:\{{{CODE_DIRECTIVE}\}}|{PYTHON_NAME.pattern}\b)")
NESTED_CODE = re.compile(
    rf"^\s*(?:(?:```+|~~~+|:::+)\s*(?:\{{{CODE_DIRECTIVE}\}}|{PYTHON_NAME.pattern})"
    rf"|\.\.\s+{CODE_DIRECTIVE}::)",
    re.MULTILINE,
)
PROMPT = re.compile(r"\s*>>>(?:\s|$)")
HIDDEN_SKIP = re.compile(r"\s*(?:%|<!--)\s*(?:skip\b|not run|不运行|invisible-code|clear-name)")
RAW_HTML = re.compile(r"<(?:pre|code)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """A fence of a page; ``lines`` are its first and the one after its last, from 0."""

    language: str
    content: str
    lines: tuple[int, int]


@dataclass(frozen=True)
class Program:
    """A program of a page and what the page says that it prints."""

    path: str
    code: Block
    output: Block | None = None
    not_run: str = ""

    @property
    def line(self) -> int:
        """The line of the opening fence, from 1."""
        return self.code.lines[0] + 1

    @property
    def at_its_line(self) -> str:
        """The source, below so many empty lines that tracebacks point into the page."""
        return "\n" * self.line + self.code.content

    @property
    def expected(self) -> str:
        """What the page shows as printed."""
        return self.output.content if self.output else ""

    @property
    def needs_process(self) -> bool:
        """Tell whether it runs as a script: it has a main guard, processes, threads or a server."""
        return bool(SEPARATE_PROCESS.search(self.code.content))


@dataclass
class Page:
    """What was found in a page."""

    path: str
    text: str
    programs: list[Program] = field(default_factory=list)
    orphans: list[Block] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)

    def fault(self, line: int, message: str) -> None:
        """Note what is wrong on ``line``, counted from 0."""
        self.faults.append((line, message))

    def told(self) -> str:
        """Return what is wrong, one fault a line."""
        return "\n".join(f"{self.path}:{line + 1}: {what}" for line, what in sorted(self.faults))


def read_page(text: str, path: str) -> Page:
    """Find the programs of the Markdown ``text``, and what is wrong with it."""
    page = Page(path, text)
    waiting = False  # for the output of the last program
    before = ""  # the paragraph directly before the block
    for token in MARKDOWN.parse(text):
        if token.type == "fence":
            block = as_block(token)
            page.blocks.append(block)
            if block.language == "python":
                page.programs.append(Program(path, block, not_run=reason(page, block, before)))
                waiting = True
            elif block.language == "output" and waiting:
                page.programs[-1] = replace(page.programs[-1], output=block)
                waiting = False
            elif block.language == "output":
                page.orphans.append(block)
        if token.type == "inline":
            before = token.content
        elif token.type != "paragraph_close":
            before = ""
        for line, message in hidden_python(token):
            page.fault(line, message)
    for line, message in bad_lines(text):
        page.fault(line, message)
    for program in page.programs:
        if program.not_run and program.output:
            page.fault(program.output.lines[0], "output of a program that is not run")
    return page


def as_block(token: Token) -> Block:
    """Turn markdown-it's fence into a block."""
    assert token.map
    return Block(token.info.strip(), token.content, (token.map[0], token.map[1]))


def reason(page: Page, block: Block, before: str) -> str:
    """Return the reason that the reader is given for not running the block, or ``""``."""
    found = NOT_RUN.search(before)
    if found and not found[1].strip(" 。."):
        page.fault(block.lines[0], "say why it is not run, `Not run: REASON` or `不运行：原因`")
    return found[1].strip() if found else ""


def hidden_python(token: Token) -> Iterator[tuple[int, str]]:
    """Yield the line and the cure of Python that would be shown but not run."""
    line = token.map[0] if token.map else 0
    if token.type == "code_block":
        yield line, "an indented code block is not run: use a ```python fence"
    elif token.type == "html_block" and RAW_HTML.search(token.content):
        yield line, "code in raw HTML is not run: use a ```python fence"
    elif token.type == "fence":
        info = token.info.strip()
        if message := wrong_fence(info, token.content):
            yield line, message


def wrong_fence(info: str, content: str) -> str:
    """Tell what is wrong with a fence, or return ``""``."""
    message = ""
    if info in {"python", "output"}:
        pass
    elif not info:
        message = "a fence without a language: write ```python, ```output, ```sh or ```text"
    elif PYTHON_NAME.match(info):
        message = f"```{info} is not run: write ```python, and nothing behind it"
    elif BACKTICK_CODE.match(info):
        message = f"```{info} is not run: write ```python"
    elif NESTED_CODE.search(content):
        message = f"Python inside ```{info} is not run: use :::{{...}} around a ```python fence"
    elif not info.startswith("{") and looks_like_python(content):
        message = f"Python inside ```{info} is not run: write ```python"
    return message


def looks_like_python(source: str) -> bool:
    """Tell whether ``source`` is Python with at least one statement that is typical of it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    typical = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    typical += (ast.With, ast.AsyncWith, ast.For, ast.AsyncFor, ast.Await, ast.Call)
    return any(isinstance(node, typical) for node in ast.walk(tree))


def bad_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield what may stand on no line at all."""
    for number, line in enumerate(whole_lines(text)):
        if PROMPT.match(line):
            yield number, "a >>> prompt is not run: write a program in a ```python fence"
        elif COLON_CODE.match(line):
            yield number, "::: around code is not run: write a ```python fence"
        elif HIDDEN_SKIP.match(line):
            yield (
                number,
                "the reader does not see this: write `Not run: REASON` or `不运行：原因` "
                "as the paragraph before the program",
            )


def whole_lines(text: str) -> list[str]:
    """Split at newlines alone, as Markdown does."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def line_offsets(text: str) -> list[int]:
    """Return where each line of ``text`` begins, and where the last one ends."""
    return [0, *itertools.accumulate(map(len, whole_lines(text)))]
