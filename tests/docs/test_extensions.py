"""Our own extensions of Sphinx, each by its rule."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("sphinx", reason="Sphinx is not installed")

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "conf"), str(ROOT / "conf" / "extensions")]

import defaults  # noqa: E402
import docstrings  # noqa: E402
import languages  # noqa: E402
import measured  # noqa: E402
import picture  # noqa: E402
import prose  # noqa: E402
import reliability  # noqa: E402
from docutils import nodes  # noqa: E402 -- the extensions are found through the path above

PICTURES = sorted(path.stem for path in (ROOT / "conf" / "pictures").glob("[a-z]*.py"))


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (["一句。\n又一句"], "一句。又一句"),
        (["一句", "\n", "又一句"], "一句又一句"),
        (["见", "code", "。\n", "code", " 之后"], "见code。code 之后"),
        (["用 asyncio\n写"], "用 asyncio\n写"),
        (["“引号”\nasyncio"], "“引号”asyncio"),
        (["plain\ntext"], "plain\ntext"),
    ],
)
def test_lines_are_joined(parts: list[str], whole: str) -> None:
    """A line break beside a full-width character is dropped; between words it stays a blank."""
    assert "".join(prose.joined(parts)) == whole


def test_asterisks_are_found() -> None:
    """Bold text that did not become bold is told, in prose and not in code."""
    document = nodes.paragraph("", "", nodes.Text("**并发。**后续"), nodes.literal("", "2**3"))
    assert [str(text) for text in prose.stray_markup(document)] == ["**并发。**后续"]


def test_a_figure_is_looked_up(tmp_path: Path) -> None:
    """A figure comes from the file that a run has written; before that it is a dash."""
    assert measured.lookup("proof.programs.zh", tmp_path) == "—"
    (tmp_path / "proof.json").write_text(json.dumps({"programs": {"zh": 1234}, "seconds": 0.5}))
    assert measured.lookup("proof.programs.zh", tmp_path) == "1,234"
    assert measured.lookup("proof.seconds", tmp_path) == "0.5"
    assert measured.lookup("proof.nothing", tmp_path) == "—"
    assert measured.lookup("proof.programs", tmp_path) == "—"


def test_a_name_without_docstring_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a function, nor a class, nor its method stays without a docstring."""
    module = ModuleType("bare", "Told.")
    source = """
from dataclasses import dataclass
__all__ = ["silent", "Told", "Fields"]
def silent(): pass
class Told:
    "Told."
    def silent(self): pass
    def _private(self): pass
    @property
    def told(self): "Told."
@dataclass
class Fields: number: int
def private(): pass
"""
    monkeypatch.setitem(sys.modules, "bare", module)  # dataclass looks there
    exec(source, vars(module))  # noqa: S102 -- the text above
    assert list(docstrings.undocumented(module)) == [
        "bare.silent",
        "bare.Told.silent",
        "bare.Fields",
    ]


DOCSTRING = """Do it.

Args:
    rate: Tokens a second; may
        be a fraction. More is faster.
    on (type): What to retry: errors.

Raises:
    ValueError: Never.
"""


def test_the_arguments_are_read() -> None:
    """The table of defaults takes the first sentence of what a docstring says of an argument."""
    texts = defaults.described(DOCSTRING)
    assert texts == {
        "rate": "Tokens a second; may be a fraction. More is faster.",
        "on": "What to retry: errors.",
    }
    assert defaults.first_sentence(texts["rate"]) == "Tokens a second; may be a fraction"
    assert defaults.first_sentence("每秒的令牌数。可以是小数。") == "每秒的令牌数"


@pytest.mark.parametrize("language", ["zh_CN", "en"])
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn(name: str, language: str) -> None:
    """Every picture is well-formed, names no colour, and is the same each time."""
    drawn = picture.draw(name, language)
    assert ET.fromstring(drawn).attrib["viewBox"]  # noqa: S314 -- our own file
    assert "#" not in drawn.replace("url(#", "").replace('href="#', "").replace("&#", "")
    assert drawn == picture.draw(name, language)


def test_a_label_that_the_theme_has_lost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a new version of Furo changes its labels, the build says so."""
    here = languages.LANGUAGES["en"]
    told: list[object] = []
    monkeypatch.setattr(languages.logger, "warning", lambda *args, **_: told.append(args))
    page = '<aside class="sidebar-drawer"><aside class="toc-drawer no-toc">'
    assert 'aria-label="All pages"' in languages.localize(page, here, "index")
    assert not told
    languages.localize("<p>", here, "index")
    assert len(told) == len(here.labels)


def public_names(module: str) -> list[str]:
    """Return what a module of the package offers; the second half of the process pool: nothing."""
    names: list[str] = importlib.import_module(f"concurrency_patterns.{module}").__all__
    return names


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_module_is_in_the_reference(language: str) -> None:
    """A new module with public names gets its page in both languages, and its place in the list."""
    reference = ROOT / "docs" / language / "reference"
    files = (ROOT / "src" / "concurrency_patterns").glob("[a-z]*.py")
    modules = {path.stem for path in files if public_names(path.stem)}
    assert {path.stem for path in reference.glob("*.rst")} == modules
    listed = (reference / "index.md").read_text(encoding="utf-8").splitlines()
    assert modules <= set(listed)


def asked(right: bool | None, observed: str) -> dict[str, object]:
    """Make the finding of a probe."""
    return {"right": right, "observed": observed}


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_findings_are_put_together(language: str) -> None:
    """Those of whom the same was seen stand in one line, and what the rule asks for comes first."""
    directive = object.__new__(reliability.Reliability)
    directive.language, directive.words = language, reliability.WORDS[language]
    findings = {
        "b": asked(False, "MaxAttempts"),
        "c": asked(None, "never waits"),
        reliability.OURS: asked(True, "1.3 s"),
        "d": asked(True, "1.3 s"),
    }
    lines = [re.sub("<.*?>", "", item.astext()) for item in directive.findings(findings).children]
    assert lines == (
        ["✓ 1.3 秒：concurrency-patterns、d", "✗ MaxAttempts：b", "– 从不等待：c"]
        if language == "zh"
        else ["✓ 1.3 s: concurrency-patterns, d", "✗ MaxAttempts: b", "– never waits: c"]
    )


def test_every_finding_has_a_translation() -> None:
    """Whatever was seen is a figure, the name of an exception, or has its words in Chinese."""
    results = json.loads(reliability.RESULTS.read_text(encoding="utf-8"))
    seen = {
        finding["observed"]
        for found in results.values()
        for probe in found["probes"]
        for finding in probe["findings"].values()
    }
    told = {text for text in seen if not re.fullmatch(r"[\d.,→ s]+|[A-Z]\w+", text)}
    assert told <= set(reliability.WORDS["zh"])
