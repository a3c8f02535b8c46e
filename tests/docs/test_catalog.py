"""No docstring reaches the Chinese reference untranslated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

polib = pytest.importorskip("polib", reason="polib is not installed")
pytest.importorskip("sphinx", reason="Sphinx is not installed")

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "conf"))

import catalog  # noqa: E402 -- found through the path above

MODULE = '''"""{first}"""

__all__ = ["double"]


def double(number: int) -> int:
    """Double a number.

    Args:
        number: The ``number`` to double.

    Returns:
        Twice the number.
    """
    return 2 * number
'''


def tree(folder: Path, first: str = "Doubles.") -> dict[str, polib.POFile]:
    """Write a package and its reference, and return the messages of its docstrings."""
    reference = folder / "docs" / "en" / "reference"
    reference.mkdir(parents=True, exist_ok=True)
    (folder / "doubling.py").write_text(MODULE.format(first=first))
    (reference / "index.md").write_text("# Reference\n\n```{toctree}\ndoubling\n```\n")
    (reference / "doubling.rst").write_text("Doubling\n========\n\n.. automodule:: doubling\n")
    return catalog.templates(folder / "docs" / "en", str(folder))


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> polib.POFile:
    """Return the messages of a small module."""
    return tree(tmp_path_factory.mktemp("package"))["doubling"]


def translate(wanted: polib.POFile) -> polib.POFile:
    """Return a catalog in which everything is translated."""
    done = catalog.merged(wanted, polib.POFile())
    for entry in done:
        entry.msgstr = "译文" + "".join(catalog.MARKUP.findall(entry.msgid))
    return done


def test_only_docstrings_are_asked_for(wanted: polib.POFile) -> None:
    """Neither types, nor the page's own title, nor Sphinx's labels are in the catalog."""
    assert [entry.msgid for entry in wanted] == [
        "Doubles.",
        "Double a number.",
        "The ``number`` to double.",
        "Twice the number.",
    ]


def test_a_full_catalog_passes(wanted: polib.POFile) -> None:
    """A translation of everything has no problem."""
    assert catalog.problems(wanted, translate(wanted)) == []


def test_untranslated(wanted: polib.POFile) -> None:
    """An empty translation is told."""
    done = translate(wanted)
    done[1].msgstr = ""
    assert catalog.problems(wanted, done) == ["untranslated: Double a number."]


def test_fuzzy(wanted: polib.POFile) -> None:
    """A guess is told: Sphinx would show the English text in its place."""
    done = translate(wanted)
    done[1].flags.append("fuzzy")
    assert catalog.problems(wanted, done) == ["fuzzy: Double a number."]


def test_obsolete(wanted: polib.POFile) -> None:
    """A translation that was put aside is told."""
    done = translate(wanted)
    done.append(polib.POEntry(msgid="Triple.", msgstr="三倍。", obsolete=True))
    assert catalog.problems(wanted, done) == ["obsolete: Triple."]


def test_other_markup(wanted: polib.POFile) -> None:
    """A translation that loses a literal or a link is told."""
    done = translate(wanted)
    done[2].msgstr = "要加倍的数。"
    problem = "other markup than in the docstring: The ``number`` to double."
    assert catalog.problems(wanted, done) == [problem]


def test_not_as_the_tool_writes_it(wanted: polib.POFile) -> None:
    """A catalog that `update` would change is told."""
    done = translate(wanted)
    done.header = "by hand"
    assert catalog.problems(wanted, done) == ["not as `python conf/catalog.py update` writes it"]


def test_a_changed_docstring(wanted: polib.POFile, tmp_path: Path) -> None:
    """Who changes a docstring hears that the translation is missing; `update` asks for it."""
    catalogs = tmp_path / "catalogs"
    catalogs.mkdir()
    translate(wanted).save(str(catalogs / "doubling.po"))
    assert catalog.check({"doubling": wanted}, catalogs) == []
    changed = tree(tmp_path, "Doubles numbers.")
    assert catalog.check(changed, catalogs) == [
        "doubling.po: not in the catalog: Doubles numbers.",
        "doubling.po: no such docstring any more: Doubles.",
    ]
    catalog.update(changed, catalogs)
    assert catalog.check(changed, catalogs) == ["doubling.po: untranslated: Doubles numbers."]


def test_a_catalog_without_a_page(wanted: polib.POFile, tmp_path: Path) -> None:
    """A catalog that no page uses is told, and `update` removes it."""
    translate(wanted).save(str(tmp_path / "doubling.po"))
    translate(wanted).save(str(tmp_path / "tripling.po"))
    assert catalog.check({"doubling": wanted}, tmp_path) == ["tripling.po: no such page"]
    catalog.update({"doubling": wanted}, tmp_path)
    assert catalog.check({"doubling": wanted}, tmp_path) == []


def test_nothing_found_is_no_success(tmp_path: Path) -> None:
    """A check that finds no docstring at all fails instead of passing."""
    empty = tmp_path / "page.pot"
    polib.POFile().save(str(empty))
    with pytest.raises(catalog.NoDocstringError, match="page"):
        catalog.messages("page", empty)
    with pytest.raises(catalog.NoDocstringError):
        catalog.check({}, tmp_path)
