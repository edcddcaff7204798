"""The look of a report: one style sheet, no font or file from elsewhere."""

from __future__ import annotations

STYLESHEET = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d252c; --soft: #5c6873; --rule: #d9dee3;
  --accent: #1f5aa6; --card: #ffffff;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans",
    "Noto Sans", sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15191d; --ink: #e6e9ec; --soft: #9aa6b1; --rule: #343c44; --accent: #7db2f0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1, h2 { font-family: var(--serif); font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.7rem, 1.2rem + 2vw, 2.5rem); margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 3rem 0 1rem; }
.kicker { color: var(--soft); margin: 0 0 .5rem; font-size: .9rem; }
.lede { font: 1.15rem/1.55 var(--serif); max-width: 46em; margin: 0 0 2rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0 1.5rem; margin: 0;
  border-top: 1px solid var(--rule); }
.figures div { border-bottom: 1px solid var(--rule); padding: .8rem 0 .9rem; }
.figures dt { color: var(--soft); font-size: .82rem; }
.figures dd { margin: 0; font: 600 1.6rem/1.25 var(--serif); font-variant-numeric: lining-nums; }
.figures dd small { display: block; font: .82rem/1.4 var(--sans); color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .5rem .2rem .5rem 1.1rem; text-align: right; vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.numbers td { white-space: nowrap; }
.numbers tbody th { white-space: nowrap; }
thead th { font-weight: 500; color: var(--soft); font-size: .82rem; vertical-align: bottom;
  border-bottom: 1.5px solid var(--ink); }
tbody th { font-weight: 400; }
tbody tr { border-bottom: 1px solid var(--rule); }
.summary tbody tr:first-child > * { font-weight: 650; color: var(--accent); }
.words td, .words th { text-align: left; overflow-wrap: anywhere; white-space: normal; }
p.words { max-width: 46em; margin: 0 0 1.6rem; }
.settings { font-size: .85rem; }
.settings tbody { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2.2rem 2rem; align-items: start; }
figure { margin: 0; min-width: 0; }
figure h3 { font: 600 1rem/1.3 var(--sans); margin: 0 0 .5rem; }
figcaption { color: var(--soft); font-size: .88rem; line-height: 1.45; margin-top: .5rem; }
.plot { background: var(--card); }
.plot svg { display: block; width: 100%; height: auto; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
.plot svg text { font-family: var(--sans) !important; }
details { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
summary { cursor: pointer; font: 600 1.15rem/1.3 var(--serif); margin-bottom: .8rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (prefers-color-scheme: dark) { .plot { padding: .6rem; border-radius: 6px; } }
.numbers th:first-child { position: sticky; left: 0; background: var(--paper); }
@media (max-width: 760px) { main { padding: 1.6rem 1rem 3rem; } .plots { grid-template-columns: minmax(0, 1fr); }
  h2 { margin-top: 2.2rem; } .figures dd { font-size: 1.35rem; } .lede { font-size: 1.05rem; }
  .numbers tbody th { min-width: 8.5em; white-space: normal; } .numbers thead th { white-space: nowrap; }
  .modules tbody th { overflow-wrap: anywhere; } }
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --rule: #bbb; --accent: #123f7a; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } h2 { margin-top: 1.6rem; break-after: avoid; }
  .plot { padding: 0; } figure, tr, .figures div { break-inside: avoid; } .scroll { overflow: visible; } }
"""
