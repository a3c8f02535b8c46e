"""``{performance} what``: tables drawn from tests/benchmarks/results.json.

``what`` is the name of a pattern (all that was measured of it), or ``targets``, ``machine``, or
``packages``. Nobody types a figure: ``tox run -e bench`` writes the file.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from sphinx.application import Sphinx

    Cell: TypeAlias = nodes.Node | list[nodes.Node]

RESULTS = Path(__file__).parents[2] / "tests" / "benchmarks" / "results.json"
OURS = "concurrency-patterns"
DASH = "–"
NOTHING = "—"
CROWD = 3.0  # the bar ends at so many times the baseline, or ours if that is longer

WORDS = {
    "zh": {
        "who": "谁",
        "ratio": "倍数",
        "share": "实际 / 要求",
        "bar": "条形",
        "middle": "中间一半",
        "time": "每次",
        "work": "做什么",
        "target": "目标",
        "measured": "量得",
        "verdict": "结果",
        "met": "达到",
        "missed": "未达到",
        "a peer is faster": "有同类更快",
        "best": "最快的同类",
        "none": "没有同类",
        "cpu": "处理器",
        "cores": "核数",
        "system": "系统",
        "python": "Python",
        "date": "日期",
        "rounds": "轮数",
        "package": "包",
        "version": "版本",
        "not installed": "没有安装",
        "has no batches": "不能成批",
        "has no batches yet": "还不能成批",
        "did not open": "没有打开",
        "gave up before the tenth retry": "不到 10 次就放弃了",
        "out_of_order": "{} 个不按次序",
        "asked for": "要求的速率",
        "one timer and futures": "一个定时器加 future",
        "no limit": "不限制",
        "decorator that does nothing": "什么也不做的装饰器",
        "bare loop with sleep(0)": "手写循环加 sleep(0)",
        "bare raise": "直接抛出",
        "try and except": "手写 try 和 except",
        "sum of the parts": "各部分之和",
        "five decorators by hand": "手工叠五个装饰器",
        "a pipe for each worker": "每个进程一条管道",
        "no other process": "不用别的进程",
    },
    "en": {
        "who": "Who",
        "ratio": "Ratio",
        "share": "Real / asked for",
        "bar": "Bar",
        "middle": "Middle half",
        "time": "Each",
        "work": "Work",
        "target": "Target",
        "measured": "Measured",
        "verdict": "Result",
        "met": "met",
        "missed": "missed",
        "best": "Fastest peer",
        "none": "no peer",
        "cpu": "Processor",
        "cores": "Cores",
        "system": "System",
        "python": "Python",
        "date": "Date",
        "rounds": "Rounds",
        "package": "Package",
        "version": "Version",
        "out_of_order": "{} out of order",
    },
}


# From here on a rounded number has three digits before the point.
THREE_DIGITS = 99.5


def figure(value: float) -> str:
    """Write a ratio with three digits at most."""
    return f"{value:,.0f}" if value >= THREE_DIGITS else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Write a time with the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def met(candidate: dict[str, Any]) -> bool:
    """Tell whether a candidate keeps to its target."""
    if "failed" in candidate:
        return False
    ratio = candidate["ratio"]["median"]
    low, high = candidate.get("at_least", 0), candidate.get("at_most", float("inf"))
    return bool(low <= ratio <= high)


def has_target(candidate: dict[str, Any]) -> bool:
    """Tell whether a candidate has a target."""
    return "at_most" in candidate or "at_least" in candidate


def best_peer(case: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fastest of the other libraries; the standard library is the baseline."""
    peers = [
        candidate
        for candidate in case["candidates"]
        if candidate.get("package", OURS) != OURS and "failed" not in candidate
    ]
    if case["unit"] == "share":  # of a rate: the one that is nearest to it
        return min(peers, key=lambda peer: abs(1 - peer["ratio"]["median"]), default=None)
    return min(peers, key=lambda peer: peer["ratio"]["median"], default=None)


def bar(candidate: dict[str, Any], full: float) -> str:
    """Draw a bar, with a mark where the target is."""
    ratio = candidate["ratio"]["median"]
    kind = "measure beyond" if ratio > full else "measure"
    parts = [f'<i style="width:{min(ratio / full, 1):.1%}"></i>']
    limit = candidate.get("at_most", candidate.get("at_least"))
    if limit is not None and limit <= full:
        parts.append(f'<b style="left:{limit / full:.1%}"></b>')
    return f'<span class="{kind}" aria-hidden="true">{"".join(parts)}</span>'


class Drawn(SphinxDirective, ABC):
    """Something that is drawn from a file of results, in the words of the page's language."""

    required_arguments = 1
    file: Path
    vocabulary: dict[str, dict[str, str]]

    def run(self) -> list[nodes.Node]:
        """Read the file, and draw what the argument names."""
        self.env.note_dependency(str(self.file))
        self.language = self.config.language[:2]
        self.words = self.vocabulary[self.language]
        return self.draw(self.arguments[0], json.loads(self.file.read_text(encoding="utf-8")))

    @abstractmethod
    def draw(self, what: str, results: dict[str, Any]) -> list[nodes.Node]:
        """Draw what the argument names from what the file holds."""

    def say(self, text: str) -> str:
        """Return a word in the language of the page; what was not translated as it is."""
        return self.words.get(text, text)


class Performance(Drawn):
    """One of the tables."""

    file = RESULTS
    vocabulary = WORDS

    def draw(self, what: str, results: dict[str, Any]) -> list[nodes.Node]:
        """Return the table, or a table for each case of a pattern."""
        if what in results["patterns"]:
            return [self.case(case) for case in results["patterns"][what]["cases"]]
        makers = {"targets": self.targets, "machine": self.machine, "packages": self.packages}
        if what not in makers:
            raise self.error(f"nothing was measured under the name {what}")
        return [makers[what](results)]

    def case(self, case: dict[str, Any]) -> nodes.table:
        """Draw one case: a row and a bar for each candidate, the smallest figure first."""
        share = case["unit"] == "share"
        measured = [c for c in case["candidates"] if "failed" not in c]
        ours = [c["ratio"]["median"] for c in measured if c.get("package") == OURS][:1]
        longest = max(c["ratio"]["median"] for c in measured)
        full = longest if share else min(longest, max([CROWD, *(1.5 * r for r in ours)]))
        headings = [self.say("who"), self.say("share" if share else "ratio"), self.say("bar")]
        headings += [self.say("middle")] + ([] if share else [self.say("time")])
        rows = []
        ranked = sorted(measured, key=lambda c: c["ratio"]["median"], reverse=share)
        for candidate in ranked:
            ratio = candidate["ratio"]
            cells: list[nodes.Node] = [
                self.title(candidate),
                nodes.Text(figure(ratio["median"])),
                nodes.raw("", bar(candidate, full), format="html"),
                nodes.Text(f"{figure(ratio['q1'])} {DASH} {figure(ratio['q3'])}"),
            ]
            rows.append(cells + ([] if share else [nodes.Text(duration(candidate["value"]))]))
        for candidate in case["candidates"]:
            if "failed" in candidate:
                ranked.append(candidate)
                told = nodes.emphasis("", self.say(candidate["failed"]))
                rows.append([self.title(candidate), nodes.Text(NOTHING), told])
        return mark_ours(table(headings, rows, "measures", case[self.language]), ranked)

    def title(self, candidate: dict[str, Any]) -> nodes.Node:
        """Return the name of a candidate, and what else was seen of it."""
        text = candidate["name"]
        if text.startswith("("):  # no name, but a description
            name = nodes.inline("", self.say(text[1:-1]))
        else:
            name = nodes.inline("", "", nodes.literal("", text))
        for fact, value in candidate.get("facts", {}).items():
            name += nodes.Text(f" ({self.say(fact).format(f'{value:,}')})")
        return name

    def targets(self, results: dict[str, Any]) -> nodes.table:
        """Tell of each target whether it is met."""
        rows = [
            self.target(case, candidate)
            for found in results["patterns"].values()
            for case in found["cases"]
            for candidate in filter(has_target, case["candidates"])
        ]
        names = ("work", "target", "measured", "verdict", "best")
        return table([self.say(name) for name in names], rows, "targets")

    def target(self, case: dict[str, Any], candidate: dict[str, Any]) -> list[Cell]:
        """Return the row of one target."""
        work = [nodes.literal("", candidate["name"]), nodes.Text(case[self.language])]
        low, high = candidate.get("at_least"), candidate["at_most"]
        limit = f"≤ {figure(high)}" if low is None else f"{figure(low)} {DASH} {figure(high)}"
        reached = "met" if met(candidate) else "missed"
        verdict = [nodes.inline("", self.say(reached), classes=[f"target-{reached}"])]
        peer = best_peer(case)
        if "failed" in candidate:
            told = self.say(candidate["failed"])
        else:
            told = figure(candidate["ratio"]["median"])
            if (
                peer
                and case["unit"] != "share"
                and peer["ratio"]["median"] < candidate["ratio"]["median"]
            ):
                verdict.append(nodes.Text(self.say("a peer is faster")))
        best: Cell = nodes.Text(self.say("none"))
        if peer:
            best = [nodes.literal("", peer["name"]), nodes.Text(figure(peer["ratio"]["median"]))]
        return [work, nodes.Text(limit), nodes.Text(told), verdict, best]

    def machine(self, results: dict[str, Any]) -> nodes.table:
        """Tell on what it was measured, and when."""
        facts = dict(results["machine"])
        found = results["patterns"].values()
        dates = sorted({pattern["date"] for pattern in found})
        rounds = sorted({case["rounds"] for pattern in found for case in pattern["cases"]})
        facts["date"] = f" {DASH} ".join(dict.fromkeys([dates[0], dates[-1]]))
        facts["rounds"] = f" {DASH} ".join(dict.fromkeys([str(rounds[0]), str(rounds[-1])]))
        rows = [[nodes.Text(self.say(name)), nodes.Text(str(facts[name]))] for name in facts]
        return table(None, rows, "machine")

    def packages(self, results: dict[str, Any]) -> nodes.table:
        """Tell which versions were measured."""
        found: dict[str, str] = {}
        for pattern in results["patterns"].values():
            found |= pattern["packages"]
        return versions(found, self.words)


def versions(found: dict[str, str], words: dict[str, str]) -> nodes.table:
    """Tell which versions these packages had, in the words of a language."""
    missing = words.get("not installed", "not installed")
    rows = [[nodes.literal("", name), nodes.Text(found[name] or missing)] for name in sorted(found)]
    return table([words["package"], words["version"]], rows, "packages")


def table(
    headings: list[str] | None, rows: Sequence[Sequence[Cell]], kind: str, title: str = ""
) -> nodes.table:
    """Return a table; a row with too few cells gets empty ones."""
    width = len(headings or rows[0])
    group = nodes.tgroup("", cols=width)
    group += [nodes.colspec(colwidth=1) for _ in range(width)]
    if headings:
        group += nodes.thead("", as_row([nodes.Text(heading) for heading in headings], width))
    group += nodes.tbody("", *(as_row(cells, width) for cells in rows))
    made = nodes.table("", classes=[kind])
    if title:
        made += nodes.title("", title)
    made += group
    return made


def as_row(cells: Sequence[Cell], width: int) -> nodes.row:
    """Return a row of so many cells; what is a list becomes one line for each."""
    filled = [*cells, *([] for _ in range(width - len(cells)))]
    lines = [cell if isinstance(cell, list) else [cell] for cell in filled]
    paragraphs = [[nodes.paragraph("", "", line) for line in cell] for cell in lines]
    return nodes.row("", *(nodes.entry("", *cell) for cell in paragraphs))


def mark_ours(made: nodes.table, ranked: list[dict[str, Any]]) -> nodes.table:
    """Give the rows of this package a class of their own."""
    body = next(made.findall(nodes.tbody))
    for candidate, row in zip(ranked, body.children, strict=True):
        if candidate.get("package") == OURS and isinstance(row, nodes.row):
            row["classes"].append("ours")
    return made


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive, and the looks of its tables."""
    app.add_directive("performance", Performance)
    app.add_css_file("performance.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
