"""The page that `html.py` fills: its look, light, dark and on paper, and the script that sorts tables."""

import base64
import hashlib
from string import Template

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --quiet: #595959; --line: #999;
  --alarm: #a3320b; --alarmed: #fdf1ec; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e2e2e0; --quiet: #a6a6a3; --line: #6b6b6b;
    --alarm: #ff9d76; --alarmed: #35211a; }
  img { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink);
  font: 1.0625rem/1.55 Charter, "Bitstream Charter", "Source Serif 4", Georgia, "Liberation Serif", serif; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; font-weight: 600; margin: 3rem 0 .6rem; }
h3 { font-size: 1.05rem; font-weight: 600; margin: 2rem 0 .5rem; }
.result { font-size: 1.2rem; margin: 0; max-width: 54rem; overflow-wrap: anywhere; text-wrap: pretty; }
.alarm { margin: 1rem 0 0; padding: .5rem .9rem; max-width: 54rem; border-left: 4px solid var(--alarm);
  background: var(--alarmed); overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr));
  gap: 2rem 2.5rem; margin: 1.6rem 0; }
figure { margin: 0; break-inside: avoid; }
img { display: block; width: 100%; max-width: 32rem; height: auto; }
figcaption, .note { font-size: .92rem; line-height: 1.45; color: var(--quiet); margin: .5rem 0 0;
  max-width: 40rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; line-height: 1.4;
  font-variant-numeric: tabular-nums lining-nums; border: solid var(--ink); border-width: 1.5px 0; }
th, td { padding: .28rem 1.1rem .28rem 0; text-align: right; white-space: nowrap; vertical-align: baseline; }
th { font-weight: 600; border-bottom: 1px solid var(--line); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
th button:hover { text-decoration: underline; }
th[aria-sort="ascending"] button::after { content: " ↑"; }
th[aria-sort="descending"] button::after { content: " ↓"; }
.left, .hash { text-align: left; }
td.left { white-space: normal; min-width: 5rem; overflow-wrap: anywhere; }
td.left:first-child { min-width: 8rem; }
td.left.last { min-width: 14rem; }
td.hash { font: .85em/1.4 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
th:last-child, td:last-child { padding-right: .2rem; }
.marked { color: var(--alarm); background: var(--alarmed); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .9rem 1rem; margin: 0;
  padding: .8rem 0; border: solid var(--ink); border-width: 1.5px 0; font-variant-numeric: lining-nums; }
dt { font-size: .85rem; line-height: 1.3; color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } .scroll { overflow: visible; } }
"""

# A click on a head, or Enter and Space on it, sorts by its column: numbers first and by size, dashes last.
SCRIPT = """
for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", body = head.closest("table").tBodies[0];
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const text = row => row.cells[head.cellIndex].textContent;
    const number = row => parseFloat(text(row).replaceAll(",", ""));
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [number(a), number(b)], way = up ? 1 : -1;
      if (text(a) === "–" || text(b) === "–") return (text(a) === "–") - (text(b) === "–");
      if (isNaN(x) || isNaN(y)) return (isNaN(x) - isNaN(y) || text(a).localeCompare(text(b))) * way;
      return (x - y) * way;
    }));
  });
}
"""

# The policy allows this script and no other, whatever a client is called, and nothing from any network.
_ALLOWED = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
PAGE = Template(f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_ALLOWED}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>{STYLE}</style>
</head>
<body>
<h1>$title</h1>
<p class="result">$result</p>
$body
<script>{SCRIPT}</script>
</body>
</html>
""")
