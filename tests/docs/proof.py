"""The pytest side of the proof: every program of every page is a test.

``pytest docs README.md README.zh.md``                    on the virtual clock
``pytest docs README.md README.zh.md --realtime``         as scripts, on the real clock
``pytest docs README.md README.zh.md --update-outputs``   write what they print into the pages
"""

from __future__ import annotations

import difflib
import gc
import json
import platform
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sybil import Region, Sybil

from programs import Block, Page, Program, line_offsets, read_page, whole_lines
from running import Outcome, Scripts, run_here

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sybil import Document, Example

AT_ONCE = 4  # scripts: they mostly sleep


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the proof."""
    group = parser.getgroup("proof", "the programs of the pages")
    group.addoption(
        "--update-outputs", action="store_true", help="write what the programs print into the pages"
    )
    group.addoption(
        "--realtime", action="store_true", help="run every program as a script on the real clock"
    )
    group.addoption(
        "--doctrees", metavar="DIR", help="what Sphinx built (DIR/zh, DIR/en): check what it shows"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin a proof."""
    config.pluginmanager.register(Proof(config), "proof of the pages")


class Proof:
    """Collects the programs, runs them, and tells what was run."""

    def __init__(self, config: pytest.Config) -> None:
        self.root = config.rootpath
        self.realtime: bool = config.getoption("--realtime")
        self.updates: Updates | None = Updates() if config.getoption("--update-outputs") else None
        self.scripts = Scripts(AT_ONCE)
        self.pages: set[Path] = set()
        self.ran: Counter[str] = Counter()
        self.simulated = 0.0
        self.began = time.perf_counter()
        self.sybil = Sybil([self.parse], pattern="*.md", path=str(self.root))
        self.collect_page = self.sybil.pytest()

    def pytest_collect_file(
        self, file_path: Path, parent: pytest.Collector
    ) -> pytest.Collector | None:
        """Collect the pages and the two READMEs."""
        if not self.is_page(file_path):
            return None
        self.pages.add(file_path)
        return self.collect_page(file_path, parent)

    def is_page(self, path: Path) -> bool:
        """Tell whether ``path`` is read by readers of the handbook."""
        readmes = {self.root / "README.md", self.root / "README.zh.md"}
        return path in readmes or (path.suffix == ".md" and self.root / "docs" in path.parents)

    def parse(self, document: Document) -> Iterator[Region]:
        """Yield the programs of a page to Sybil; Python that would not run is an error."""
        page = read_page(document.text, str(Path(document.path).relative_to(self.root)))
        if page.faults:
            raise pytest.Collector.CollectError(page.told())
        yield from regions(page, self.evaluate)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start the programs that run as scripts: they run while the others are looked at."""
        if session.config.option.collectonly:
            return
        gc.collect()
        gc.freeze()  # what is there now need not be looked at after each program
        self.began = time.perf_counter()
        examples = [item.example for item in session.items if hasattr(item, "example")]
        programs = [example.parsed for example in examples if isinstance(example.parsed, Program)]
        self.scripts.start(program for program in programs if self.is_script(program))

    def is_script(self, program: Program) -> bool:
        """Tell whether a program runs as a script in this run."""
        return not program.not_run and (self.realtime or program.needs_process)

    def evaluate(self, example: Example) -> str | None:
        """Run a program and tell how it differs from what the page shows."""
        program = example.parsed
        if isinstance(program, Block):
            return "no program stands before this output"
        if program.not_run:
            pytest.skip(program.not_run)
        outcome = self.scripts.outcome(program) if self.is_script(program) else run_here(program)
        self.ran[language(program.path)] += 1
        self.simulated += outcome.simulated
        if self.updates and not outcome.error and outcome.printed:
            self.updates.add(example.document.path, program, outcome.shown)
            return None
        return difference(program, outcome)

    def pytest_sessionfinish(self) -> None:
        """Stop the scripts that nobody waits for, and write what is to be updated."""
        self.scripts.stop()
        if self.updates:
            self.updates.write()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell how much was proved, and write the figures for the page that shows them."""
        if not self.ran:
            return
        figures = self.figures()
        terminalreporter.write_line(
            "{clock} clock: {programs} programs (zh {programs_zh}, en {programs_en}) on {pages} "
            "pages, {simulated_seconds} s simulated, in {wall_seconds} s".format(**figures)
        )
        if self.scripts.again:
            terminalreporter.write_line(f"{self.scripts.again} times a script was run again, alone")
        if self.updates:
            terminalreporter.write_line(self.updates.told())
        if terminalreporter.stats.get("failed") or not self.is_whole(terminalreporter):
            return
        name = "proof-realtime.json" if self.realtime else "proof.json"
        target = self.root / "build" / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    def is_whole(self, terminalreporter: pytest.TerminalReporter) -> bool:
        """Tell whether all pages were run, and not a selection."""
        pages = {path for path in (self.root / "docs").rglob("*.md") if self.is_page(path)}
        chosen = any(terminalreporter.stats.get(word) for word in ("deselected", "error"))
        return bool(pages) and pages <= self.pages and not chosen

    def figures(self) -> dict[str, str | int | float]:
        """Return what was run, as flat names and numbers."""
        return {
            "clock": "real" if self.realtime else "virtual",
            "programs": sum(self.ran.values()),
            "programs_zh": self.ran["zh"],
            "programs_en": self.ran["en"],
            "pages": len(self.pages),
            "simulated_seconds": round(self.simulated, 1),
            "wall_seconds": round(time.perf_counter() - self.began, 1),
            "python": platform.python_version(),
        }


def language(path: str) -> str:
    """Return the language of a page by its path."""
    return "zh" if "zh" in Path(path).parts or path.endswith(".zh.md") else "en"


def regions(page: Page, evaluate: object) -> Iterator[Region]:
    """Yield the programs of a page, and outputs without one, as Sybil's regions."""
    offsets = line_offsets(page.text)

    def region(parsed: Program | Block, first: Block, last: Block) -> Region:
        return Region(offsets[first.lines[0]], offsets[last.lines[1]], parsed, evaluate)

    for program in page.programs:
        yield region(program, program.code, program.output or program.code)
    for orphan in page.orphans:
        yield region(orphan, orphan, orphan)


def difference(program: Program, outcome: Outcome) -> str | None:
    """Tell how an outcome differs from what the page shows."""
    if outcome.error:
        return f"{outcome.printed}{outcome.error}"
    if not outcome.printed:
        return "prints nothing: a program shows what it does"
    if not program.output:
        return f"prints, but no ```output block follows:\n{outcome.printed}"
    if outcome.shown == program.expected:
        return None
    shown = [program.expected.splitlines(), outcome.shown.splitlines(), "the page", "printed"]
    return "\n".join(difflib.unified_diff(*shown, lineterm=""))


class Updates:
    """Outputs that are to be written into their pages."""

    def __init__(self) -> None:
        self.pages: dict[str, list[tuple[Program, str]]] = defaultdict(list)

    def add(self, path: str, program: Program, printed: str) -> None:
        """Note an output, if the page shows another one."""
        if printed != program.expected:
            self.pages[path].append((program, printed))

    def write(self) -> None:
        """Write each page once, from its end, so that line numbers stay right."""
        for path, outputs in self.pages.items():
            lines = whole_lines(Path(path).read_text(encoding="utf-8"))
            for program, printed in sorted(outputs, key=lambda output: -output[0].line):
                replace_output(lines, program, printed)
            Path(path).write_text("".join(lines), encoding="utf-8")

    def told(self) -> str:
        """Return a summary."""
        count = sum(len(outputs) for outputs in self.pages.values())
        return f"{count} outputs written into {len(self.pages)} pages"


def replace_output(lines: list[str], program: Program, printed: str) -> None:
    """Put an output in the place of the old one, or behind the program."""
    indent = lines[program.code.lines[0]].partition("`")[0]
    fresh = [f"{indent}{line}" for line in ("```output\n", *whole_lines(printed), "```\n")]
    if program.output:
        start, end = program.output.lines
        lines[start:end] = fresh
    else:
        lines[program.code.lines[1] : program.code.lines[1]] = ["\n", *fresh]
