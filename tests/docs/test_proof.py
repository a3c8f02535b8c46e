"""Each check of the pages fails when it should, and tells where."""

from __future__ import annotations

import json
import os
import pickle
import textwrap
from typing import TYPE_CHECKING

import pytest
from docutils import nodes
from docutils.utils import new_document

import steplock
from displayed import unproved
from programs import read_page
from running import run_here, run_script
from stamp import stamped
from steplock import Source

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

PRINTS_ONE = "```python\nprint(1)\n```\n"
ONE = "```output\n1\n```\n"
GOOD = f"{PRINTS_ONE}\n{ONE}"


def program(source: str, output: str | None = None) -> str:
    """Return the Markdown of a program and its output."""
    code = f"```python\n{textwrap.dedent(source).strip()}\n```\n"
    return code if output is None else f"{code}\n```output\n{output}\n```\n"


@pytest.fixture(name="prove")
def _prove(pytester: pytest.Pytester) -> Prove:
    """Run the proof on pages of one's own."""
    pytester.makeini("[pytest]\naddopts = -p no:doctest\nfilterwarnings = error\n")
    return Prove(pytester)


class Prove:
    """Writes ``docs/zh/page.md`` and runs its programs."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.root = pytester.path
        self.page = self.root / "docs" / "zh" / "page.md"
        self.page.parent.mkdir(parents=True)
        self.run = pytester.runpytest_inprocess

    def __call__(self, text: str, *options: str) -> pytest.RunResult:
        """Run the page and whatever else is given to pytest."""
        self.page.write_text(text, encoding="utf-8")
        plugins = ["--disable-plugin-autoload", "--assert=plain", "-p", "proof"]
        return self.run(*plugins, "-rs", "docs", *options)

    def fails(self, text: str, *lines: str) -> None:
        """Expect one failure that tells these lines."""
        result = self(text)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(lines)

    def refuses(self, text: str, *lines: str) -> None:
        """Expect that the page is not even begun, and these lines."""
        result = self(text)
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(lines)


def test_a_true_page_passes(prove: Prove) -> None:
    """A program that prints what the page shows passes and is counted."""
    result = prove(GOOD)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["virtual clock: 1 programs (zh 1, en 0) on 1 pages, *"])


def test_a_wrong_output_fails(prove: Prove) -> None:
    """The difference between the page and the run is shown."""
    prove.fails(program("print(1)\nprint(2)", "1\n3"), "*page.md, line 1*", "-3", "+2")


def test_a_blank_too_many_fails(prove: Prove) -> None:
    """Outputs are compared exactly."""
    prove.fails(program("print('a ')", "a"), "-a", "+a ")


def test_a_program_that_raises_tells_the_line(prove: Prove) -> None:
    """The traceback has the page's own frames alone, with the page's line."""
    text = program(
        """
        import asyncio

        async def main():
            await asyncio.sleep(1)
            1 / 0

        asyncio.run(main())
        """
    )
    result = prove(f"# 页\n\n{text}")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            '  File "docs/zh/page.md", line 10, in <module>',
            '  File "docs/zh/page.md", line 8, in main',
            "    1 / 0",
            "ZeroDivisionError: division by zero",
        ]
    )
    result.stdout.no_fnmatch_line("*runners.py*")


def test_a_script_that_raises_tells_the_line(prove: Prove) -> None:
    """A program in a process of its own tells the page's line, too."""
    text = program('def main():\n    1 / 0\n\nif __name__ == "__main__":\n    main()')
    prove.fails(f"# 页\n\n{text}", '  File "docs/zh/page.md", line 5, in main', "ZeroDivision*")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("```py\nprint(1)\n```", "page.md:1: ```py is not run: write ```python*"),
        ("```Python3\nprint(1)\n```", "page.md:1: ```Python3 is not run*"),
        ("```pycon\n1\n```", "page.md:1: ```pycon is not run*"),
        ("```ipython\n1\n```", "page.md:1: ```ipython is not run*"),
        ("~~~py\nprint(1)\n~~~", "page.md:1: ```py is not run*"),
        ("```python {x}\nprint(1)\n```", "page.md:1: ```python {x} is not run*"),
        ("```{code-block} python\nprint(1)\n```", "page.md:1: ```{code-block} python is not*"),
        ("```{code} sh\nls\n```", "page.md:1: ```{code} sh is not run*"),
        (":::{code-block} python\nprint(1)\n:::", "page.md:1: ::: around code is not run*"),
        ("::::{note}\n:::python\n1\n:::\n::::", "page.md:2: ::: around code is not run*"),
        (f"````{{tip}}\n{GOOD}````", "page.md:1: Python inside ```{tip} is not run*"),
        ("```{eval-rst}\n.. code-block:: python\n\n   1\n```", "page.md:1: Python inside*"),
        ("```text\nimport x\n```", "page.md:1: Python inside ```text is not run*"),
        ("```\nprint(1)\n```", "page.md:1: a fence without a language*"),
        (">>> print(1)\n1", "page.md:1: a >>> prompt is not run*"),
        ("a\n\n    print(1)\n", "page.md:3: an indented code block is not run*"),
        ("<pre>print(1)</pre>", "page.md:1: code in raw HTML is not run*"),
    ],
)
def test_hidden_python_is_refused(prove: Prove, text: str, told: str) -> None:
    """Python that a reader would see but no one runs is an error, with its line and its cure."""
    prove.refuses(f"{text}\n\n{GOOD}", f"docs/zh/{told}")


@pytest.mark.parametrize(
    "text", ["```sh\nls -l\n```", "```text\n1 → 2\n```", "```{picture} x\n图\n```"]
)
def test_other_blocks_are_welcome(prove: Prove, text: str) -> None:
    """What is no Python is left alone."""
    prove(f"{text}\n\n{GOOD}").assert_outcomes(passed=1)


def test_a_program_in_a_note_is_run(prove: Prove) -> None:
    """Colons around a program do not hide it."""
    prove.fails(f":::{{note}}\n{program('print(2)', '1')}:::\n", "+2")


@pytest.mark.parametrize("sentence", ["Not run: it never ends.", "不运行：要连外网。"])
def test_a_reason_that_is_seen_skips(prove: Prove, sentence: str) -> None:
    """A program is not run if the paragraph before it says why."""
    result = prove(f"{sentence}\n\n{PRINTS_ONE}")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines([f"SKIPPED*{sentence[-5:]}"])


@pytest.mark.parametrize("sentence", ["Not run:", "Not run: .", "不运行：。"])
def test_a_skip_without_a_reason_is_refused(prove: Prove, sentence: str) -> None:
    """The reader must be told why."""
    prove.refuses(f"{sentence}\n\n{PRINTS_ONE}", "docs/zh/page.md:3: say why it is not run*")


@pytest.mark.parametrize("line", ["% skip: next", '<!-- skip: next "x" -->', "<!-- not run: x -->"])
def test_a_skip_that_nobody_sees_is_refused(prove: Prove, line: str) -> None:
    """Sybil's own skips are invisible on the page."""
    prove.refuses(f"{line}\n\n{GOOD}", "docs/zh/page.md:1: the reader does not see this*")


def test_output_of_what_was_not_run_is_refused(prove: Prove) -> None:
    """Nobody has seen that output."""
    prove.refuses(f"Not run: slow.\n\n{GOOD}", "docs/zh/page.md:7: output of a program that is*")


def test_a_program_without_output_fails(prove: Prove) -> None:
    """What is printed must be shown."""
    prove.fails(PRINTS_ONE, "prints, but no ```output block follows:", "1")


def test_a_program_that_prints_nothing_fails(prove: Prove) -> None:
    """A program shows what it does."""
    prove.fails(program("x = 1"), "prints nothing*")


def test_output_without_a_program_fails(prove: Prove) -> None:
    """An output belongs to the program before it, and only the first one does."""
    result = prove(f"{GOOD}\n{ONE}")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["no program stands before this output"])


def test_each_program_is_complete(prove: Prove) -> None:
    """A name from an earlier program is not there."""
    result = prove(program("x = 1\nprint(x)", "1") + program("print(x)", "1"))
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["NameError: name 'x' is not defined*"])


@pytest.mark.parametrize(
    "source",
    [
        'import warnings\nwarnings.warn("old")\nprint(1)',
        'import sys\nprint("oh", file=sys.stderr)\nprint(1)',
        'import logging\nlogging.warning("oh")\nprint(1)',
        "async def f(): ...\nf()\nprint(1)",
        "import sys\nprint(1)\nsys.exit(3)",
    ],
    ids=["warning", "stderr", "log", "never awaited", "exit status"],
)
@pytest.mark.parametrize("clock", ["--realtime", "-v"])
def test_what_a_reader_would_see_besides_fails(prove: Prove, source: str, clock: str) -> None:
    """A warning, a line on stderr or a bad exit status is no output of the page."""
    prove(program(source, "1"), clock).assert_outcomes(failed=1)


def test_programs_leave_nothing_behind(prove: Prove) -> None:
    """Dataclasses, pickle and logging work as in a script, for each program anew."""
    source = """
    import logging, pickle, sys
    from dataclasses import dataclass

    @dataclass
    class Point:
        x: "int"

    logging.basicConfig(stream=sys.stdout, level="INFO", format="%(message)s")
    logging.getLogger("shop").info(pickle.loads(pickle.dumps(Point(1))))
    """
    prove(program(source, "Point(x=1)") * 2).assert_outcomes(passed=2)


def test_waiting_for_ever_is_told_as_a_deadlock(prove: Prove) -> None:
    """On the virtual clock nothing hangs."""
    text = program(
        """
        import asyncio

        async def main():
            await asyncio.Event().wait()

        asyncio.run(main())
        """
    )
    prove.fails(text, '  File "docs/zh/page.md", line 7, in <module>', "*Deadlock: these tasks*")


@pytest.mark.parametrize(
    "source",
    [
        "while True:\n    pass",
        """
        import asyncio

        async def stubborn():
            while True:
                try:
                    await asyncio.sleep(1)
                except asyncio.CancelledError:
                    pass

        async def main():
            await asyncio.gather(stubborn(), return_exceptions=True)

        asyncio.run(main())
        """,
    ],
    ids=["busy loop", "sleeps for ever, and will not be cancelled"],
)
def test_computing_for_ever_is_stopped(source: str) -> None:
    """A program that never ends is interrupted, whatever it catches."""
    (endless,) = read_page(program(source), "page.md").programs
    assert "it does not end" in run_here(endless, limit=0.2).error


def test_a_script_that_never_ends_is_stopped() -> None:
    """A script is killed with its children, and what it printed is kept."""
    source = """
    import subprocess, sys, time
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("began", flush=True)
    time.sleep(60)
    """
    (endless,) = read_page(program(source), "page.md").programs
    outcome = run_script(endless, limit=2)
    assert outcome.printed == "began\n"
    assert outcome.error == "stopped after 2 s: it does not end"


def test_scripts_see_what_is_installed_only(prove: Prove) -> None:
    """Neither the folder of the page nor PYTHONPATH is on the path of a script."""
    (prove.root / "local.py").touch()
    result = prove(program("import local\nprint(1)", "1"), "--realtime")
    result.stdout.fnmatch_lines(["ModuleNotFoundError: No module named 'local'"])


def test_realtime_takes_its_time(prove: Prove) -> None:
    """The second run executes the same programs on the real clock."""
    source = """
    import asyncio, time
    start = time.monotonic()
    asyncio.run(asyncio.sleep(0.2))
    print(time.monotonic() - start > 0.15)
    """
    prove(program(source, "True"), "--realtime").assert_outcomes(passed=1)
    prove(program(source, "True")).assert_outcomes(failed=1)


def test_a_program_with_a_server_runs_as_a_script(prove: Prove) -> None:
    """Sockets take real time on either clock, so such a program runs beside the others."""
    source = """
    import asyncio

    async def main():
        async with await asyncio.start_server(print, "127.0.0.1", 0):
            print("Virtual" in type(asyncio.get_running_loop()).__name__)

    asyncio.run(main())
    """
    prove(program(source, "False")).assert_outcomes(passed=1)


def test_update_outputs(prove: Prove) -> None:
    """Outputs are corrected and added where they stand, and the page passes afterwards."""
    listed = textwrap.indent(program("print('c')", "x"), "  ").replace("  \n", "\n")
    prove(
        program("print('a')", "x") + program("print('b')") + f"\n- 列表\n\n{listed}",
        "--update-outputs",
    ).assert_outcomes(passed=3)
    text = prove.page.read_text(encoding="utf-8")
    assert text == (
        program("print('a')", "a") + program("print('b')", "b") + f"\n- 列表\n\n{listed}"
    ).replace("  x\n", "  c\n")
    prove(text).assert_outcomes(passed=3)


def test_update_outputs_leaves_a_failing_program(prove: Prove) -> None:
    """What raises has no output to write."""
    text = program("print(1)\n1 / 0", "x")
    prove(text, "--update-outputs").assert_outcomes(failed=1)
    assert prove.page.read_text(encoding="utf-8") == text


def test_figures_are_written(prove: Prove) -> None:
    """A whole run that passes writes its figures; a failing one does not."""
    text = program("import asyncio\nasyncio.run(asyncio.sleep(90))\nprint(1)", "1")
    prove(text)
    figures = json.loads((prove.root / "build" / "proof.json").read_text(encoding="utf-8"))
    assert (figures["programs_zh"], figures["programs_en"], figures["pages"]) == (1, 0, 1)
    assert figures["simulated_seconds"] == 90
    assert figures["wall_seconds"] < 5
    (prove.root / "build" / "proof.json").unlink()
    prove(text.replace("1\n", "2\n"))
    assert not (prove.root / "build" / "proof.json").exists()


def test_only_the_handbook_is_collected(prove: Prove) -> None:
    """The pages at any depth and the READMEs are run; other Markdown is not."""
    deep = prove.page.parent / "a" / "b" / "c" / "deep.md"
    deep.parent.mkdir(parents=True)
    for path in (deep, prove.root / "README.md", prove.root / "CHANGELOG.md"):
        path.write_text(GOOD, encoding="utf-8")
    prove(GOOD, ".").assert_outcomes(passed=3)


def source(text: str, path: str = "docs/zh/page.md") -> Source:
    """Return a page."""
    return Source("page.md", path, text)


def faults(check: object, zh: str, en: str) -> list[str]:
    """Return what a check says of two texts."""
    return list(check(source(zh), source(en, "docs/en/page.md")))


def test_a_page_in_one_language_is_told(tmp_path: Path) -> None:
    """Each language must have each file."""
    for name in ("zh/both.md", "en/both.md", "zh/alone.md", "en/other.md"):
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert list(steplock.missing_pages(tmp_path)) == [
        "docs/en/alone.md is missing: docs/zh/alone.md has no translation",
        "docs/zh/other.md is missing: docs/en/other.md translates nothing",
    ]


def test_a_reference_page_that_differs_is_told(tmp_path: Path) -> None:
    """A page in reStructuredText has the same target, the same level and the same module."""
    good = ".. meta::\n   :description: {0}\n\n.. _x:\n\n{0}\n=====\n\n.. automodule:: x\n"
    zh, en = (tmp_path / "docs" / language / "x.rst" for language in ("zh", "en"))
    for path, words in ((zh, "甲"), (en, "A")):
        path.parent.mkdir(parents=True)
        path.write_text(good.format(words), encoding="utf-8")
    assert not list(steplock.reference_pages(tmp_path))
    for old, new in (("_x", "_y"), ("=====", "-----"), (":: x", ":: x\n   :members:")):
        en.write_text(good.format("A").replace(old, new), encoding="utf-8")
        assert len(list(steplock.reference_pages(tmp_path))) == 1


@pytest.mark.parametrize(
    ("zh", "en", "told"),
    [
        ("(a)=\n# 甲", "(b)=\n# A", "docs/zh/page.md:1 has target a, where docs/en/page.md:1*"),
        ("(a)=\n# 甲", "(a)=\n## A", "docs/zh/page.md:2 has h1, where docs/en/page.md:2 has h2"),
        ("# 甲\n## 乙", "# A", "docs/zh/page.md:2 has h2, where docs/en/page.md:0 has nothing"),
    ],
)
def test_other_headings_are_told(zh: str, en: str, told: str) -> None:
    """Levels and targets are the same in both languages."""
    (fault,) = faults(steplock.headings, zh, en)
    assert fault.startswith(told.removesuffix("*"))


def test_a_heading_without_a_target_is_told() -> None:
    """A Chinese heading has no lasting id of its own."""
    (fault,) = faults(steplock.targets, "(a)=\n# 甲\n## 乙", "(a)=\n# A")
    assert fault.startswith("docs/zh/page.md:3: a heading without a target")


def test_a_target_that_stands_twice_is_told() -> None:
    """A target is unique in its language."""
    pair = (source("(a)=\n# 甲"), source("(a)=\n# A"))
    assert len(list(steplock.repeated_targets([pair, pair]))) == 2


def test_other_fences_are_told() -> None:
    """The same blocks stand in the same order."""
    (fault,) = faults(steplock.fences, f"{GOOD}\n```sh\nls\n```\n", GOOD)
    assert fault == "docs/zh/page.md:9 has sh, where docs/en/page.md:end has no more fence"


@pytest.mark.parametrize(
    ("zh", "en"),
    [
        ("f(1)", "f(2)"),
        ("f('一')", "f(one)"),
        ("f(f'{x:.1f} 秒')", "f(f'{x:.2f} s')"),
        ("f(f'{x} 秒')", "f(f'{y} s')"),
        ("f(1)", "f(1)\ng(1)"),
        ("def f():\n    '甲'\n    g()", "def f():\n    'A'\n    h()"),
    ],
)
def test_programs_that_differ_are_told(zh: str, en: str) -> None:
    """A difference that is not a word is a difference."""
    (fault,) = faults(steplock.programs, program(zh), program(en))
    assert fault.startswith("docs/zh/page.md:1 and docs/en/page.md:1: the programs differ:")


def test_words_may_differ() -> None:
    """Comments, docstrings and strings are in the page's language."""
    zh = 'def f(x):\n    """甲"""\n    # 乙\n    print(f"用了 {x:.1f} 秒", "丙")'
    en = 'def f(x):\n    """A"""\n    print(f"{x:.1f} s", "C")  # B'
    assert not faults(steplock.programs, program(zh), program(en))


def test_a_stale_translation_is_told() -> None:
    """A change of the Chinese text asks for one of the English text."""
    page = "---\nhtml_meta:\n  description: x\n---\n\n# A\n"
    (unstamped,) = faults(steplock.staleness, "# 甲\n", page)
    assert "python tests/docs/stamp.py docs/en/page.md" in unstamped
    en = stamped(source("# 甲\n"), source(page))
    assert not faults(steplock.staleness, "# 甲\n", en)
    (stale,) = faults(steplock.staleness, "# 乙\n", en)
    assert stale.startswith("docs/en/page.md is stale: docs/zh/page.md has changed")
    restamped = stamped(source("# 乙\n"), source(en))
    assert restamped.count("translation:") == 1
    assert not faults(steplock.staleness, "# 乙\n", restamped)
    assert not faults(steplock.descriptions, restamped, restamped)


def test_a_page_without_description_is_told() -> None:
    """Search engines show the description."""
    assert len(faults(steplock.descriptions, "# 甲", "---\nhtml_meta: {}\n---\n# A")) == 2


@pytest.mark.parametrize(
    "text", ["**并发。**后续", "*令牌桶（Token Bucket）*限流", "**`asyncio`**库"]
)
def test_an_asterisk_that_is_seen_is_told(text: str) -> None:
    """Bold beside Chinese punctuation does not work in CommonMark."""
    (fault,) = faults(steplock.raw_asterisks, f"# 页\n\n{text}", "a **b** `c*` 2 * 3")
    assert fault.startswith("docs/zh/page.md:3: the reader sees an asterisk")


def test_chinese_in_an_english_page_is_told() -> None:
    """Code spans, the language's own name and the glossary's table are the exceptions."""
    (fault,) = faults(steplock.chinese_in_english, "", "`令牌桶` 中文\n\na，b\n")
    assert fault == "docs/en/page.md:3: Chinese in an English page: a，b"
    row = Source("glossary.md", "docs/en/glossary.md", "| 限流 | rate limiting |\n")
    assert not list(steplock.chinese_in_english(row, row))


@pytest.fixture(name="built")
def _built(tmp_path: Path) -> Built:
    return Built(tmp_path)


class Built:
    """A page as Sphinx has built it."""

    def __init__(self, root: Path) -> None:
        self.pages, self.doctrees = root / "docs", root / "doctrees"
        self.pages.mkdir()
        self.doctrees.mkdir()
        self.page, self.doctree = self.pages / "page.md", self.doctrees / "page.doctree"
        self.page.write_text(GOOD, encoding="utf-8")

    def told(self, *shown: nodes.Node) -> list[str]:
        """Return what is wrong when the built page shows these nodes."""
        document = new_document("page")
        document.reporter = None  # as Sphinx does before it writes
        document.settings.record_dependencies = None
        document += shown
        self.doctree.write_bytes(pickle.dumps(document))
        return [fault.partition(": ")[2] for fault in unproved(self.doctrees, self.pages)]


def block(text: str, language: str = "python") -> nodes.literal_block:
    """Return a code block as Sphinx keeps it."""
    return nodes.literal_block(text, text, language=language)


def test_what_was_run_may_be_shown(built: Built) -> None:
    """A program, its output and a command are all right."""
    shown = [block("print(1)\n"), block("f(1)", "output"), block("ls -l", "sh")]
    assert built.told(*shown) == []


@pytest.mark.parametrize(
    "hidden",
    [
        block("print(2)"),
        block("print(2)", "py"),
        block("print(2)", "default"),
        block("print(2)", "none"),
        block("import x", "text"),
        nodes.literal_block("print(2)", "print(2)", classes=["code", "python"]),
        nodes.doctest_block(">>> print(2)", ">>> print(2)"),
        nodes.raw("", "<pre>print(2)</pre>", format="html"),
    ],
)
def test_what_was_not_run_must_not_be_shown(built: Built, hidden: nodes.Node) -> None:
    """However the Python came to the page, it was not run."""
    (fault,) = built.told(block("print(1)"), hidden)
    assert fault.startswith("this is shown, but no program that was run:")


def test_what_was_run_must_be_shown(built: Built) -> None:
    """A program that does not come to the page proves nothing."""
    assert built.told() == ["this was run, but is not shown:\nprint(1)"]


def test_an_old_build_is_told(built: Built) -> None:
    """A page that was changed since must be built again."""
    built.told()
    os.utime(built.doctree, (0, 0))
    (fault,) = unproved(built.doctrees, built.pages)
    assert fault.endswith("was changed after it was built: build again")


def test_a_page_that_was_not_built_is_told(built: Built) -> None:
    """No page escapes the comparison."""
    (fault,) = unproved(built.doctrees, built.pages)
    assert "was not built" in fault
