// The page or the section that bears the name comes first, then what explains, then the pages that
// gather things of all kinds, which hold nearly every word. Pages that compare have a section with
// the name of each pattern, which other pages explain.
const GATHERS = /^(reference\/.*|from-the-chapter|best-practices|glossary|index)$/;
const COMPARES = /^(performance|reliability)$/;
var Scorer = {
  score: ([docname, title, anchor, descr, score, filename, kind]) => {
    if (COMPARES.test(docname)) return score / 2;
    if (kind === "title") return score + 5;
    if (kind === "object") return 0.7 * score;
    return GATHERS.test(docname) ? score / 2 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
