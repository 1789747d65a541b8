"""What the pages of this program have in common: their frame, their style and their small pieces.

A page is one file that asks nothing of the network (a content security policy in it forbids it, too),
reads on a phone and follows dark mode. What comes out of these functions is HTML; what goes in as
text is escaped here, except where a parameter's name ends in `_html`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wasi_edge.atomic import write_bytes_atomic
from wasi_edge.report import svg
from wasi_edge.report.svg import escape


def document(title_html: str, header_html: str, body_html: str, footer: str, extra_css: str = "") -> str:
    """The whole page: head, header, sections and footer."""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><meta name='referrer' content='no-referrer'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>wasi-edge: {title_html}</title><style>{svg.THEME}{_CSS}{extra_css}</style></head><body><main>"
        f"<header>{header_html}</header>{body_html}"
        f"<footer>{escape(footer)}</footer>"
        "</main></body></html>\n"
    )


def write_page(path: str | os.PathLike[str], html: str) -> None:
    """Write `html` so that `path` holds the old page or the new one, whole. Raises ArtefactError where it cannot."""
    write_bytes_atomic(path, html.encode("utf-8", "replace"))


def mapping(value: object) -> Mapping[str, Any]:
    """`value` where it is a dictionary, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: object) -> list[Mapping[str, Any]]:
    """The dictionaries of a list; none where it is not a list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, (list, tuple)) else []


def section(title: str, body_html: str) -> str:
    """A card of the page; empty where its body is."""
    return f"<section><h2>{escape(title)}</h2>{body_html}</section>" if body_html else ""


def folded(title: str, body_html: str) -> str:
    """What opens on a click; empty where its body is."""
    return f"<details><summary>{escape(title)}</summary>{body_html}</details>" if body_html else ""


def glued(text: str) -> str:
    """Escaped, with a number and its unit never on two lines."""
    return re.sub(r"(?<=\d) (?=(%|MB|min|s|h|points)\b|%)", "&nbsp;", escape(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = False) -> str:
    """A table that scrolls sideways when it must; `numeric` sets all but the first column to the right."""
    if not rows:
        return ""
    titles = "".join(f"<th scope='col'>{escape(title)}</th>" for title in head)
    titles = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    body = "".join(
        f"<tr><th scope='row'>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    opening = f"<table class='{'numeric' if numeric else 'plain'}'>"
    return f"<div class='scroll'>{opening}{titles}<tbody>{body}</tbody></table></div>"


_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1040px;margin:0 auto;padding:clamp(16px,4vw,40px)}
h1{font-size:clamp(1.35rem,3.6vw,2.1rem);line-height:1.25;margin:.2em 0 .5em;text-wrap:balance}
h2{font-size:1.2rem;margin:0 0 .8rem}h3{font-size:1rem;margin:1.2rem 0 .5rem}
.eyebrow,.note,footer,small{color:var(--muted)}.eyebrow{margin:0}.note,footer{font-size:.875rem}
.status{display:inline-block;margin:0 0 1rem;padding:.1rem .7rem;border:1px solid;border-radius:99px;
color:var(--good);font-size:.875rem}.failed,.interrupted{color:var(--bad)!important}.status:empty{display:none}
section:not(.tiles){background:var(--card);border:1px solid var(--edge);border-radius:12px;
padding:clamp(14px,3vw,24px);margin:0 0 16px}section>:last-child{margin-bottom:0}
.tiles{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px;margin:0 0 16px}
@media(min-width:720px){.tiles{grid-template-columns:repeat(3,minmax(0,1fr))}}
.tile{background:var(--card);border:1px solid var(--edge);border-radius:12px;padding:12px 14px;
display:flex;flex-direction:column;gap:2px}.tile span{font-size:.875rem}
.tile b{font-size:clamp(1.15rem,5vw,1.45rem);line-height:1.2}.tile small{font-size:.8rem;line-height:1.35}
.meter,.meter i{display:block;height:6px;border-radius:3px}.meter{background:var(--edge);margin:4px 0}
.meter i{background:var(--accent)}figcaption{font-size:.875rem;margin:0 0 .4rem;line-height:1.35}
figure{margin:0;min-width:0}figcaption span{white-space:nowrap}svg{display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:24px;align-items:start}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:12px}
.gallery img{display:block;width:100%;aspect-ratio:1;object-fit:cover;border-radius:8px;
border:3px solid var(--good);margin-bottom:.3rem}.gallery .wrong img{border:3px dashed var(--bad)}
.scroll{overflow-x:auto}ul{margin:0;padding-left:1.2em}.paths{font-size:.875rem;color:var(--muted)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.925rem}.numeric{width:100%}
th,td{padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--edge);text-align:left;vertical-align:top;
font-weight:400;overflow-wrap:break-word;max-width:24em}thead th,table.plain tbody th{color:var(--muted)}
tr>:last-child{padding-right:0}.numeric th:not(:first-child),.numeric td{text-align:right}
.numeric td{white-space:nowrap}.plain td{min-width:4em}.numeric th:first-child{max-width:10em}
dl{margin:0}dt{color:var(--muted);font-size:.875rem}dd{margin:0 0 .7rem}
code{font:.9rem/1.5 ui-monospace,monospace;background:var(--bg);padding:.15rem .45rem;border-radius:6px;
border:1px solid var(--edge);display:inline-block;max-width:100%}code span{display:inline-block}
details{border-top:1px solid var(--edge);padding:.5rem 0}summary{cursor:pointer}
details>:last-child{margin:.5rem 0}@media print{body{background:#fff}section{break-inside:avoid}}
"""
