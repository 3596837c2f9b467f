"""What every page is drawn with."""

import math
from typing import Any


def number(value: Any, digits: int = 4) -> str:
    """A number for people: thousands separated, `digits` significant digits, a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds -> "4 min 32 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def readable_bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def round_ticks(low: float, high: float) -> list[float]:
    """Four to seven round values that enclose [low, high]."""
    span, size = high - low, max(abs(low), abs(high))
    if span <= max(1e-9 * size, 1e-300):  # equal but for rounding
        span = size if size > 1e-300 else 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if span / (m * unit) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--ink:#1d2126;--soft:#626b76;--rule:#e4e5e3;--wash:#f3f4f2;
--c0:#0f7b6c;--c1:#3667c7;--c2:#c2601a;--c3:#8a4fbd;--c4:#a83a5d;--c5:#6a7f13}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e6e8ea;--soft:#98a2ad;--rule:#2e343a;
--wash:#23282d;--c0:#4cc3ae;--c1:#7ea6f4;--c2:#ec9a5c;--c3:#c08fee;--c4:#ee86a5;--c5:#b5c95a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:26px;font-weight:650;letter-spacing:-.01em;margin:0}
h2{font-size:18px;font-weight:650;margin:48px 0 4px}
h3{font-size:15px;font-weight:600;margin:0}
p{margin:0}.soft,.note{color:var(--soft)}.note{font-size:13px;margin-bottom:14px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 18px}
.grid{display:grid;gap:16px}.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.tiles{grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin-top:24px;gap:12px}
.tile{padding:14px 16px}.tile b{display:block;font-size:21px;font-weight:600;letter-spacing:-.01em;white-space:nowrap}
.tile span{font-size:13px;color:var(--soft)}.tile.lead{border-color:var(--c0);grid-column:span 2}
.tile.lead b{color:var(--c0);font-size:28px;line-height:1.2}
svg{display:block;width:100%;height:auto;margin-top:6px;font-size:11px;fill:var(--soft)}
.gridline{stroke:var(--rule)}.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.k0{--k:var(--c0)}.k1{--k:var(--c1)}.k2{--k:var(--c2)}.k3{--k:var(--c3)}.k4{--k:var(--c4)}.k5{--k:var(--c5)}
.line{stroke:var(--k)}.dot{fill:var(--k);stroke:var(--card);stroke-width:1.5}
.band>rect.hit{fill:transparent}.band>g{visibility:hidden;pointer-events:none}.band:hover>g{visibility:visible}
.band line{stroke:var(--soft);stroke-dasharray:2 3}.band .box{fill:var(--card);stroke:var(--rule)}
.band text{fill:var(--ink)}.band .key{fill:var(--k)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin-top:4px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--k);margin-right:6px}
.sample{margin-bottom:12px}.sample .cols{display:grid;gap:12px 24px;margin-top:10px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.prompt,.response{white-space:pre-wrap;overflow-wrap:anywhere;max-height:15em;overflow:auto}
.prompt{font-weight:550}.response{background:var(--wash);border-radius:8px;padding:10px 12px}
.head{display:flex;justify-content:space-between;font-size:13px;color:var(--soft);margin:0 2px 4px}
.scroll{overflow-x:auto;padding:0}table{border-collapse:collapse;font-size:13px;width:100%}
th,td{padding:5px 14px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
tr:last-child>*{border-bottom:0}thead th{color:var(--soft);font-weight:500}
tbody th{position:sticky;left:0;background:var(--card);text-align:left;font-weight:400}
.pairs td{text-align:left;white-space:normal;overflow-wrap:anywhere}.pairs th{color:var(--soft);vertical-align:top}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""
