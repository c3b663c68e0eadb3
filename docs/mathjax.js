// SPDX-License-Identifier: Apache-2.0
// Formulas are what arithmatex marks, and nothing else on a page.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
