"""The page of the claims: a table on top, then each study's numbers and picture. One file, no script, no links out."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.verdicts import FAILS, HOLDS, HOLDS_IF, IN_PART, form_of, split

if TYPE_CHECKING:
    from benchmarks.reproduce import Outcome

_COLOURS = {HOLDS: "#1a7f37", HOLDS_IF: "#9a6700", IN_PART: "#9a6700", FAILS: "#b42318"}
_NOTE = (
    "The thesis: Anders Øland, Efficient Deep Learning, CMU-CS-24-147, 2024. Only its abstract was at hand; "
    "claims are told in our words, methods are the best published ones for the same claim. Verdicts are computed from "
    "the rows, over seeds that systems share, with 95 % intervals."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; vertical-align: top; padding: .5rem;
border-bottom: 1px solid #d0d7de; } img { max-width: 100%; } .small { color: #59636e; font-size: .85rem; }
"""


def write_page(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the page of these outcomes; a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(page(outcomes), encoding="utf-8")
    partial.replace(path)


def page(outcomes: Sequence[Outcome]) -> str:
    """The page as HTML."""
    rows = "".join(_table_row(one) for one in outcomes)
    head = "<tr><th>claim</th><th>the thesis</th><th>anchor</th><th>ours</th><th>verdict</th></tr>"
    sections = "".join(_section(one) for one in outcomes)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>The claims, reproduced</title>"
        f"<style>{_STYLE}</style><h1>The claims, reproduced</h1><p class=small>{escape(_NOTE)}</p>"
        f"<table>{head}{rows}</table>{sections}</html>\n"
    )


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table for a README."""
    lines = ["| claim | anchor | ours | verdict |", "|---|---|---|---|"]
    for one in outcomes:
        said, found = split(one.verdict) if one.verdict else ("no result", one.error)
        cells = (f"{one.claim.key} {one.claim.title}", one.claim.anchor, headline(found), f"**{said}**")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def headline(found: str) -> str:
    """The first of the numbers that a verdict gives."""
    return found.split("; ")[0]


def _table_row(one: Outcome) -> str:
    claim = one.claim
    said, found = split(one.verdict) if one.verdict else ("no result", one.error)
    cells = (
        f"<a href='#{claim.key}'>{claim.key}</a> {escape(claim.title)}",
        escape(claim.words),
        escape(claim.anchor),
        escape(headline(found)),
        _coloured(said),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _section(one: Outcome) -> str:
    claim = one.claim
    parts = [f"<h2 id='{claim.key}'>{claim.key}: {escape(claim.title)}</h2>", f"<p>{escape(claim.words)}</p>"]
    if one.verdict:
        said, found = split(one.verdict)
        items = "".join(f"<li>{escape(part)}</li>" for part in found.split("; "))
        parts.append(f"<p>{_coloured(said)}</p><ul>{items}</ul>")
    if one.error:
        parts.append(f"<p style='color:{_COLOURS[FAILS]}'>Failed: {escape(one.error)}</p>")
    if one.picture is not None:
        data = base64.b64encode(one.picture.read_bytes()).decode()
        parts.append(f"<img alt='{escape(claim.title)}' src='data:image/svg+xml;base64,{data}'>")
    source = f"{one.source}, {one.seconds:.0f} s; {one.num_rows} rows; study: {claim.module}"
    parts.append(f"<p class=small>{escape('; '.join([source, *one.machines]))}</p>")
    return "".join(parts)


def _coloured(said: str) -> str:
    return f"<b style='color:{_COLOURS.get(form_of(said), '#1f2328')}'>{escape(said)}</b>"
