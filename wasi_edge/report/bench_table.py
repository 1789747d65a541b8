"""The result of `wasi-edge bench` in plain words and as tables for the terminal; the HTML page shares the words.

A speed-up never stands alone: beside it are its spread (the quartiles of the pairwise ratios) and the
bound that the FLOPs allow. "In 0.43 of the memory" is the peak of a fresh process over that of
`vanilla` with the same batch, as the kernel counts it; what the paper counts is another thing and
has its own table on the page. Any value may be missing: it then reads "–", or its clause goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wasi_edge.report.page import mappings
from wasi_edge.report.svg import finite, number_text, printable
from wasi_edge.report.words import percent
from wasi_edge.units import format_size

Row = Mapping[str, Any]
_MISSING = "–"
_MOST_SENTENCES = 4
_STATUS_CLAUSES = {"failed": "The bench failed", "interrupted": "Interrupted; what was measured before stands"}


class BenchGroup(NamedTuple):
    """The rows of one model and batch size: those that may be compared with each other."""

    model: str
    batch: float | None
    rows: Sequence[Row]
    vanilla: Row

    @property
    def title(self) -> str:
        """ "vit_base_patch16_224, batch 8"."""
        batch = "" if self.batch is None else f"batch {number_text(self.batch)}"
        return ", ".join(part for part in (self.model, batch) if part) or "results"


# ---- words -------------------------------------------------------------------------------------


def bench_groups(result: Mapping[str, Any]) -> list[BenchGroup]:
    """The rows by model and batch, in the order of their first appearance."""
    by_key: dict[tuple[str, float | None], list[Row]] = {}
    for row in mappings(result.get("results")):
        key = printable(row.get("model") or ""), finite(row.get("batch"))
        by_key.setdefault(key, []).append(row)
    return [
        BenchGroup(*key, found, next((row for row in found if row.get("method") == "vanilla"), {}))
        for key, found in by_key.items()
    ]


def row_name(row: Row) -> str:
    """ "wasi 0.8", "lora"."""
    epsilon = finite(row.get("epsilon"))
    return f"{printable(row.get('method') or '?')}{'' if epsilon is None else f' {number_text(epsilon)}'}"


def figure(value: object, places: int | None = None) -> str:
    """A figure with `places` decimals, or with about three digits that matter."""
    number = finite(value)
    if number is None:
        return _MISSING
    if places is None:
        places = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2 if abs(number) >= 0.1 else 4
    return f"{number:.{places}f}"


def spread_of(row: Row, key: str) -> tuple[float, float] | None:
    """The [low, high] under `key`, where both are known."""
    given = row.get(key)
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        return None
    low, high = finite(given[0]), finite(given[1])
    return None if low is None or high is None else (low, high)


def spread_text(row: Row, key: str) -> str:
    """ "1.82 to 1.90"."""
    spread = spread_of(row, key)
    return _MISSING if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f}"


def share(part: object, whole: object) -> float | None:
    """`part / whole`, where both are known."""
    above, below = finite(part), finite(whole)
    return None if above is None or not below else above / below


def count_text(value: object, unit: str = "") -> str:
    """A large count: "86.6 M", "4.2 k", "35.1 G"."""
    number = finite(value)
    if number is None:
        return _MISSING
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{figure(number / size, 0 if number >= 100 * size else 1)} {letter}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def size_text(value: object) -> str:
    """Bytes as MB, where they are known."""
    number = finite(value)
    return _MISSING if number is None else format_size(number)


# ---- sentences ---------------------------------------------------------------------------------


def bench_sentences(result: Mapping[str, Any]) -> list[str]:
    """One to four plain sentences: what the bench came to, the most telling first."""
    sentences = []
    if clause := _STATUS_CLAUSES.get(str(result.get("status"))):
        error = printable(result.get("error") or "").rstrip(".")
        sentences.append(f"{clause}: {error}." if error else f"{clause}.")
    groups = bench_groups(result)
    measured = [group for group in groups if _contenders(group)]
    if not measured:
        return [*sentences, "Nothing was compared with vanilla."]
    group = measured[0]
    main, *others = _contenders(group)
    sentences += [_training(main, group, len(groups) > 1), _inference(main), _other_ranks(others)]
    sentences += [_batches(measured, main), _against_lora(main, group)]
    return [sentence for sentence in sentences if sentence][:_MOST_SENTENCES]


def _contenders(group: BenchGroup) -> list[Row]:
    """The rows to speak of, at falling epsilon: those of wasi, else of the fastest method measured."""
    rows = [row for row in group.rows if row is not group.vanilla and finite(row.get("train_speedup")) is not None]
    if not rows:
        return []
    fastest = max(rows, key=lambda row: finite(row.get("train_speedup")) or 0.0).get("method")
    methods = [row.get("method") for row in rows]
    method = next((name for name in ("wasi", "wsi", "asi") if name in methods), fastest)
    chosen = [row for row in rows if row.get("method") == method]
    return sorted(chosen, key=lambda row: -(finite(row.get("epsilon")) or 0.0))


def _spoken(row: Row, with_batch: bool) -> str:
    """ "wasi at epsilon 0.8 and batch 8 (synthetic weights)"."""
    terms = [("epsilon", finite(row.get("epsilon"))), ("batch", finite(row.get("batch")) if with_batch else None)]
    known = " and ".join(f"{name} {number_text(value)}" for name, value in terms if value is not None)
    mark = " (synthetic weights)" if row.get("synthetic") else ""
    return printable(row.get("method")) + (f" at {known}" if known else "") + mark


def _pace(row: Row, kind: str) -> str:
    """ "1.86x as fast as vanilla (1.82 to 1.90) of at most 2.21x that the FLOPs allow"."""
    text = f"{figure(row.get(f'{kind}_speedup'), 2)}x as fast as vanilla"
    if spread_of(row, f"{kind}_speedup_spread"):
        text += f" ({spread_text(row, f'{kind}_speedup_spread')})"
    if finite(row.get(f"{kind}_bound")) is not None:
        text += f" of at most {figure(row.get(f'{kind}_bound'), 2)}x that the FLOPs allow"
    return text


def _training(row: Row, group: BenchGroup, with_batch: bool) -> str:
    memory = share(row.get("peak_rss_bytes"), group.vanilla.get("peak_rss_bytes"))
    clause = "" if memory is None else f", in {memory:.2f} of the memory"
    return f"{_spoken(row, with_batch)} trains {_pace(row, 'train')}{clause}."


def _inference(row: Row) -> str:
    clauses = [f"it infers {_pace(row, 'infer')}"] if finite(row.get("infer_speedup")) is not None else []
    copies = finite(row.get("window_copies_fraction"))
    if copies is not None:
        clauses.append(f"{percent(copies)} of a training step bring tokens to other windows")
    error, rank = finite(row.get("gradient_error")), finite(row.get("rank"))
    at = "" if rank is None else f" at rank {number_text(rank)}"
    if error is not None:
        clauses.append(f"its gradients are off by {figure(error, 2)} on real photos{at}")
    elif row.get("synthetic") and "asi" in str(row.get("method")):
        clauses.append("how exact its gradients are cannot be told from synthetic weights")
    return _sentence(clauses)


def _other_ranks(rows: Sequence[Row]) -> str:
    clauses = []
    for row in rows:
        infers = f" and infers {figure(row['infer_speedup'], 2)}x" if finite(row.get("infer_speedup")) else ""
        at = number_text(finite(row.get("epsilon")) or 0.0)
        clauses.append(f"at epsilon {at} it trains {figure(row.get('train_speedup'), 2)}x{infers} as fast")
    return _sentence(clauses)


def _sentence(clauses: Sequence[str]) -> str:
    text = "; ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _batches(groups: Sequence[BenchGroup], main: Row) -> str:
    """How the speed-up of the same row moves with the batch."""
    found = {
        group.batch: finite(row.get("train_speedup"))
        for group in groups
        for row in group.rows
        if group.batch is not None and group.model == printable(main.get("model") or "")
        if row_name(row) == row_name(main) and finite(row.get("train_speedup")) is not None
    }
    if len(found) < 2:
        return ""
    parts = [f"{figure(found[batch], 2)}x at batch {number_text(batch)}" for batch in sorted(found)]
    return f"By batch size it trains {', '.join(parts[:-1])} and {parts[-1]}."


def _against_lora(main: Row, group: BenchGroup) -> str:
    lora = next((row for row in group.rows if row.get("method") == "lora" and row is not main), {})
    ratio = share(lora.get("train_ms_per_image"), main.get("train_ms_per_image"))
    return f"Against lora it trains {ratio:.2f}x as fast." if ratio is not None else ""


# ---- the terminal ------------------------------------------------------------------------------

_COLUMNS: Sequence[tuple[str, Callable[[Row, BenchGroup], str]]] = (
    ("train\nof bound", lambda row, _: _ratio_cell(row, "train")),
    ("infer\nof bound", lambda row, _: _ratio_cell(row, "infer")),
    ("ms/image\ntrain, infer", lambda row, _: _lines(row, figure, "train_ms_per_image", "infer_ms_per_image")),
    ("peak\nmemory", lambda row, group: _memory_cell(row, group)),
    ("gradient\nerror", lambda row, _: figure(row.get("gradient_error"), 2)),
)


def bench_table(result: Mapping[str, Any]) -> RenderableType:
    """A table for each model and batch, each cell's second line saying what its first is to be held against."""
    parts: list[RenderableType] = []
    for group in bench_groups(result):
        marked = any(row.get("synthetic") for row in group.rows)
        parts.append(Text(group.title + (", synthetic weights" if marked else ""), style="bold"))
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
        table.add_column("method", overflow="fold", min_width=min(18, max(len(row_name(row)) for row in group.rows)))
        cells = [[cell(row, group) for row in group.rows] for _, cell in _COLUMNS]
        shown = [i for i, column in enumerate(cells) if any(text.strip(f"{_MISSING}\n") for text in column)]
        for i in shown:
            table.add_column(_COLUMNS[i][0], justify="right", no_wrap=True)
        for number, row in enumerate(group.rows):
            table.add_row(Text(row_name(row)), *(Text(cells[i][number]) for i in shown))
        parts.append(table)
    return Group(*parts) if parts else Text("nothing was measured")


def _ratio_cell(row: Row, kind: str) -> str:
    """ "1.86 of 2.21" above "1.82 to 1.90"."""
    ratio, bound = row.get(f"{kind}_speedup"), row.get(f"{kind}_bound")
    first = figure(ratio, 2) + ("" if finite(bound) is None else f" of {figure(bound, 2)}")
    spread = spread_text(row, f"{kind}_speedup_spread")
    return first if spread == _MISSING else f"{first}\n{spread}"


def _memory_cell(row: Row, group: BenchGroup) -> str:
    ratio = share(row.get("peak_rss_bytes"), group.vanilla.get("peak_rss_bytes"))
    return size_text(row.get("peak_rss_bytes")) + ("" if ratio is None else f"\n{ratio:.2f}")


def _lines(row: Row, text: Callable[[object], str], *keys: str) -> str:
    return "\n".join(text(row.get(key)) for key in keys)
