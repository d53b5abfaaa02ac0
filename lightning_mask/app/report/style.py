"""How the page looks; colours of light and dark machines, widths from a phone's on."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1b1d21; --soft: #5c616b; --line: #e3e3dd; --track: #ecece7;
  --active: #0b7a6f; --on: #ffffff; --good: #0a7a45; --bad: #b3261e; --warn: #fff4d6; --warnline: #e2b93b;
  --c0: #0b7a6f; --c1: #c2570c; --c2: #2f63c9; --c3: #8a3fc7; --c4: #b8326d; --c5: #6b7000; }
@media (prefers-color-scheme: dark) { :root {
  --page: #111315; --card: #1a1d20; --ink: #ececea; --soft: #a2a8b1; --line: #30353a; --track: #282c30;
  --active: #35c9b6; --on: #08201d; --good: #5bd495; --bad: #ff8f85; --warn: #372c0c; --warnline: #8a6d16;
  --c0: #35c9b6; --c1: #f4954a; --c2: #7da6f7; --c3: #c597f2; --c4: #f08bb8; --c5: #c5cb55; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .87em; }
code { overflow-wrap: anywhere; unicode-bidi: isolate; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -.01em; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 18px 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 10px; }
.soft, small { color: var(--soft); }
small { font-size: 13px; }
header { display: flex; gap: 18px; align-items: flex-start; margin-bottom: 22px; }
header > div { min-width: 0; }
header svg { flex: none; width: 46px; height: 46px; margin-top: 2px; }
.on { fill: var(--active); } .off { fill: var(--track); stroke: var(--line); stroke-width: .5; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 10px; }
.chips code { background: var(--track); border-radius: 6px; padding: 2px 8px; max-width: 100%; }
.note { background: var(--warn); border: 1px solid var(--warnline); border-radius: 10px; padding: 10px 14px;
  margin-bottom: 14px;
  overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile, section, details { background: var(--card); border: 1px solid var(--line); border-radius: 14px; }
.tile { padding: 14px 16px; min-width: 0; }
.tile b { display: block; font-size: 23px; line-height: 1.25; letter-spacing: -.02em; font-weight: 650;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: 13px; }
.tile .label { display: block; font-weight: 600; overflow-wrap: anywhere; }
.good { color: var(--good) !important; } .bad { color: var(--bad) !important; }
section { padding: 20px; margin-bottom: 16px; min-width: 0; }
.wide { overflow-x: auto; max-width: 100%; }
.wide:focus-visible { outline: 2px solid var(--active); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: 12.5px; font-weight: 600; color: var(--soft); white-space: nowrap; }
td, th { padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: middle; unicode-bidi: isolate; }
tbody tr:last-child > * { border-bottom: 0; }
td:first-child, th:first-child { padding-left: 0; } td:last-child, th:last-child { padding-right: 0; }
td code { overflow-wrap: normal; }
.values td code { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
.sums tbody tr:last-child td { font-weight: 650; border-top: 2px solid var(--line); }
.bar { display: block; width: 120px; height: 8px; border-radius: 4px; background: var(--track); overflow: hidden; }
.bar i { display: block; height: 100%; min-width: 0; background: var(--active); border-radius: 4px; }
.names td:first-child { min-width: 150px; }
.values td { min-width: 90px; overflow-wrap: anywhere; }
.values td:first-child { min-width: 190px; }
figure { margin: 16px 0 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; font-size: 13.5px; margin: 0 0 6px; }
figcaption small { flex-basis: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; min-width: 0; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; background: currentColor; }
.last { color: var(--soft); font-variant-numeric: tabular-nums; }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); }
.s3 { color: var(--c3); } .s4 { color: var(--c4); } .s5 { color: var(--c5); }
.plot { position: relative; margin-left: 58px; }
.plot svg { display: block; width: 100%; height: 150px; overflow: visible; }
.y span { position: absolute; right: calc(100% + 8px); transform: translateY(-50%); font-size: 12px; color: var(--soft);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
.x { position: relative; height: 20px; margin: 4px 0 0 58px; }
.x span { position: absolute; transform: translateX(-50%); font-size: 12px; color: var(--soft); white-space: nowrap; }
.x .end { transform: translateX(-100%); }
.plot path { fill: none; vector-effect: non-scaling-stroke; }
.rule { stroke: var(--line); stroke-width: 1; }
.begin { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 3 4; }
.curve { stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.dots { stroke: currentColor; stroke-width: 7; stroke-linecap: round; }
.plot .range { fill: currentColor; fill-opacity: .16; stroke: none; }
.phases { position: relative; height: 34px; margin: 14px 0 0 58px; background: var(--track); border-radius: 8px;
  overflow: hidden; }
.phase { position: absolute; top: 0; bottom: 0; padding: 7px 10px; font-size: 13px; line-height: 20px; font-weight: 600;
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; color: var(--on); background: var(--c0);
  border-right: 2px solid var(--card); }
.phase.p1 { background: color-mix(in srgb, var(--c0) 72%, var(--c2)); }
.grids { display: flex; flex-wrap: wrap; gap: 10px 34px; } .grids > div { min-width: 0; max-width: 100%; }
table.heat { width: auto; border-collapse: separate; border-spacing: 2px; }
.heat td, .heat th { border: 0; padding: 0; } .heat th { font-weight: 500; padding: 0 6px; }
.heat th[scope=row] { text-align: left; } .heat thead th { text-align: center; }
.heat td { min-width: 46px; height: 26px; border-radius: 4px; text-align: center; font-size: 11.5px;
  white-space: nowrap; padding: 0 4px;
  background: color-mix(in srgb, var(--active) calc(var(--d) * 100%), var(--track)); }
.heat td.deep { color: var(--on); } .heat td.none { background: none; }
.heat th code { font-size: 12px; }
.scale { display: flex; flex-wrap: wrap; gap: 4px 12px; font-size: 12.5px; color: var(--soft); margin: 6px 0 4px;
  align-items: center; }
.scale i { display: inline-block; width: 18px; height: 12px; border-radius: 3px; margin-right: 5px; vertical-align: -1px;
  background: color-mix(in srgb, var(--active) calc(var(--d) * 100%), var(--track)); }
.confusion thead th { max-width: 110px; overflow: hidden; text-overflow: ellipsis; }
.strip { display: grid; grid-template-columns: minmax(0, 34%) 1fr 62px; gap: 10px; align-items: center;
  font-size: 12.5px; margin: 2px 0; }
.strip code { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; direction: rtl; text-align: left; }
.strip svg { width: 100%; height: 14px; background: var(--track); border-radius: 3px; fill: var(--active); }
.strip span { text-align: right; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 8px 34px; }
.two > * { min-width: 0; }
details { padding: 0 20px; margin-bottom: 12px; } summary { cursor: pointer; padding: 14px 0; font-weight: 600; }
section details { border: 0; padding: 0; margin: 12px 0 0; }
details[open] > :last-child { margin-bottom: 18px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; unicode-bidi: isolate; }
footer { color: var(--soft); font-size: 13px; margin-top: 22px; overflow-wrap: anywhere; }
@media (max-width: 600px) { main { padding: 18px 12px 40px; } section { padding: 16px 14px; } h1 { font-size: 24px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; } .tile { padding: 12px; } .tile b { font-size: 21px; }
  .plot, .phases { margin-left: 50px; }
.x { margin-left: 50px; }
.bar { width: 70px; }
header { gap: 12px; }
header svg { width: 36px; height: 36px; } }
@media (max-width: 600px) {
  td, th { padding: 6px 5px; font-size: 13px; }
  .names td:first-child, .values td:first-child { min-width: 112px; }
  .names td { font-size: 12.5px; }
  .names td code { overflow-wrap: anywhere; }
  .names :is(th, td):is(:nth-child(2), :nth-child(3), :nth-child(6)) { display: none; }
  .values td { min-width: 70px; }
  .x span { font-size: 10.5px; }
  .heat td { min-width: 31px; padding: 0 1px; font-size: 10.5px; }
  .heat th { padding: 0 3px 0 0; white-space: normal; }
  .heat th code { font-size: 11px; }
  .confusion td { min-width: 27px; padding: 0; font-size: 10.5px; }
  .confusion th { padding: 0 3px; }
}
@media (prefers-color-scheme: dark) { .heat td.mid { color: var(--on); } }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
