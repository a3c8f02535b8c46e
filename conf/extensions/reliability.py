"""``{reliability} what``: what tests/probes/results.json tells of each library.

``what`` is the name of a table (an overview with a mark for each library and probe, and below it
each probe with its rule and what was seen), or ``packages``, or ``when``. Nobody types a verdict:
``tox run -e probe`` writes the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from performance import DASH, OURS, Drawn, table, versions
from performance import WORDS as PERFORMANCE

if TYPE_CHECKING:
    from sphinx.application import Sphinx

RESULTS = Path(__file__).parents[2] / "tests" / "probes" / "results.json"
# The mark, the class, and what a reader hears who sees neither.
MARKS = {
    True: ("✓", "right", {"zh": "符合", "en": "as the rule asks"}),
    False: ("✗", "wrong", {"zh": "不符合", "en": "otherwise"}),
    None: ("–", "none", {"zh": "没有", "en": "not offered"}),
}

WORDS = {
    "zh": {
        "library": "库",
        "rule": "应当：",
        "colon": "：",
        "comma": "、",
        "period": "。",
        "date": "日期",
        "python": "Python",
        "seconds": " 秒",
        # What was seen.
        "hangs": "挂住",
        "not offered": "没有这项功能",
        "ignored": "没有影响",
        "counts as a failure": "算失败",
        "counts as a success": "算成功",
        "its place is free again": "名额空出来",
        "its place is lost": "名额收不回来",
        "closes the circuit": "使它关闭",
        "opens the circuit": "使它打开",
        "another is let through": "放行",
        "nobody is": "谁也不放行",
        "no matter": "没变",
        "closes early or stays open": "变了",
        "the service's": "服务的",
        "does not guard async def": "对 `async def` 不起作用",
        "refused at once": "立即拒绝",
        "granted": "给了",
        "not within 6 s": "6 秒之内没有等到",
        "never waits": "从不等待",
        "one token a call": "每次只能取一个",
        "one token an attempt": "每次尝试一个",
        "not in this order": "没有这种次序",
        "stays closed": "仍然关闭",
        "a warning": "警告",
        "no warning": "不说",
        "yes": "还在做",
        "no": "不再做",
        "only that call": "只有那一个",
        "all calls under way": "正在做和排队的全部",
        "the whole pool": "整个进程池，之后也不能用",
        "no error": "没有出错",
        "is stopped": "被终止",
        "goes on": "没有被终止",
    },
    "en": {
        "library": "Library",
        "rule": "Right: ",
        "colon": ": ",
        "comma": ", ",
        "period": ".",
        "date": "Date",
        "python": "Python",
        "seconds": " s",
        "ignored": "nothing",
        "does not guard async def": "does not guard `async def`",
        "no matter": "no",
        "closes early or stays open": "yes",
        "the whole pool": "the whole pool, which is of no use afterwards",
        "all calls under way": "all that were under way or waiting",
    },
}


class Reliability(Drawn):
    """One of the tables."""

    file = RESULTS
    vocabulary = WORDS

    def draw(self, what: str, results: dict[str, Any]) -> list[nodes.Node]:
        """Return the overview and the probes of a table, or the facts about all of them."""
        if what in results:
            probes = results[what]["probes"]
            ids = [f"reliability-{what}-{probe['key']}".replace("_", "-") for probe in probes]
            return [self.overview(probes, ids), self.probes(probes, ids)]
        if what == "packages":
            found: dict[str, str] = {}
            for one in results.values():
                found |= one["packages"]
            return [versions(found, PERFORMANCE[self.language])]
        if what == "when":
            return [self.when(results)]
        raise self.error(f"nothing was asked under the name {what}")

    def overview(self, probes: list[dict[str, Any]], ids: list[str]) -> nodes.table:
        """Draw a row for each library, with a mark for each probe."""
        rows = []
        names = list(probes[0]["findings"])
        for name in names:
            marks = [self.mark(probe["findings"][name]["right"]) for probe in probes]
            rows.append([library(name), *marks])
        headings = [self.say("library"), *(str(number) for number in range(1, len(ids) + 1))]
        made = table(headings, rows, "verdicts")
        for target, entry in zip(["", *ids], next(made.findall(nodes.thead))[0], strict=True):
            if target:
                link = nodes.reference("", "", entry[0][0], refid=target, internal=True)
                entry[0].replace(entry[0][0], link)
        for name, row in zip(names, next(made.findall(nodes.tbody)).children, strict=True):
            if name == OURS and isinstance(row, nodes.row):
                row["classes"].append("ours")
        return made

    def mark(self, right: bool | None) -> nodes.Node:
        """Return the mark of a finding."""
        mark, kind, heard = MARKS[right]
        label = heard[self.language]
        html = f'<span class="verdict {kind}" role="img" aria-label="{label}">{mark}</span>'
        return nodes.raw("", html, format="html")

    def probes(self, probes: list[dict[str, Any]], ids: list[str]) -> nodes.enumerated_list:
        """Tell of each probe what is right, and what was seen of whom."""
        made = nodes.enumerated_list("", enumtype="arabic", classes=["probes"])
        for probe, target in zip(probes, ids, strict=True):
            question = nodes.strong("", probe[self.language])
            rule = self.say("rule") + probe[f"{self.language}_rule"] + self.say("period")
            item = nodes.list_item("", nodes.paragraph("", "", question), ids=[target])
            item += nodes.paragraph("", rule)
            item += self.findings(probe["findings"])
            made += item
        return made

    def findings(self, findings: dict[str, Any]) -> nodes.bullet_list:
        """Put those together of whom the same was seen; what the rule asks for comes first."""
        groups: dict[tuple[bool | None, str], list[str]] = {}
        for name, finding in findings.items():
            groups.setdefault((finding["right"], finding["observed"]), []).append(name)
        order = [True, False, None]
        made = nodes.bullet_list("", classes=["findings"])
        for (right, observed), names in sorted(groups.items(), key=lambda g: order.index(g[0][0])):
            line = nodes.paragraph("", "", self.mark(right), nodes.Text(" "))
            line += [*self.seen(observed), nodes.Text(self.say("colon"))]
            for number, name in enumerate(names):
                line += [nodes.Text(self.say("comma"))] if number else []
                line += library(name)
            made += nodes.list_item("", line)
        return made

    def seen(self, observed: str) -> list[nodes.Node]:
        """Write what was seen; the name of an exception, and what is in backquotes, as code."""
        text = re.sub(r"(?<=\d) s\b", self.say("seconds"), self.say(observed))
        if text == observed and observed.isidentifier() and not observed.islower():
            text = f"`{observed}`"
        parts = text.split("`")
        return [
            nodes.literal("", part) if number % 2 else nodes.Text(part)
            for number, part in enumerate(parts)
            if part
        ]

    def when(self, results: dict[str, Any]) -> nodes.table:
        """Tell when it was asked, and with which Python."""
        dates = sorted({one["date"] for one in results.values()})
        pythons = sorted({one["python"] for one in results.values()})
        facts = {
            "date": f" {DASH} ".join(dict.fromkeys([dates[0], dates[-1]])),
            "python": ", ".join(pythons),
        }
        rows = [[nodes.Text(self.say(name)), nodes.Text(fact)] for name, fact in facts.items()]
        return table(None, rows, "machine")


def library(name: str) -> nodes.Node:
    """Return the name of a library; ours is set apart."""
    kind = nodes.strong if name == OURS else nodes.inline
    return kind("", name, classes=["library"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive, and the looks of its tables."""
    app.add_directive("reliability", Reliability)
    app.add_css_file("reliability.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
