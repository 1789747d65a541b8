"""The page of `wasi-edge bench`, from the dictionary that is also its JSON.

It is for someone who doubts the figures. So nothing stands alone: a speed-up beside its spread and the
bound of its FLOPs, memory beside vanilla's, what the paper counts beside what a process really took,
predictions beside measurements, the machine before beside the machine after; and weights that are not
real are marked wherever they appear. Rows are compared only inside one model and batch size. Any value
may be missing: a column, a plot or a section with nothing to show is left out, and so is a plot of one point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wasi_edge.report import words
from wasi_edge.report.bench_plots import memory_chart, pareto_chart, prediction_chart, speed_chart
from wasi_edge.report.bench_table import (
    BenchGroup,
    Row,
    bench_groups,
    bench_sentences,
    count_text,
    figure,
    row_name,
    share,
    size_text,
    spread_text,
)
from wasi_edge.report.page import document, folded, glued, mapping, mappings, section, table
from wasi_edge.report.svg import escape, finite, number_text

Cell = Callable[[Row, BenchGroup], str]
_MISSING = "–"
_KINDS = ("qkv", "proj", "fc1", "fc2")
_METHODS_NOTE = (
    "×: times as fast as vanilla at the same batch, the median of pairwise ratios in one interleaved run; spread: "
    "their quartiles; bound: vanilla's FLOPs over the method's, upkeep counted. The number after a method is epsilon, "
    "the share of the weights' variance that the factors keep. Peak memory is that of a fresh process in training."
)
_SYNTHETIC_NOTE = (
    "Synthetic: weights are random, at the ranks that pretrained networks have at that epsilon. Time and memory "
    "do not depend on their values; the gradient error does, so none is given."
)
_PAPER_NOTE = (
    "The paper counts linear layers only, and on paper: their products, and the tensors that they keep. Process memory "
    "is what the kernel counts for a fresh process: libraries, optimiser, all other layers and buffers with it. "
    "These are two quantities, never to be set against each other: compare with vanilla inside a column."
)


def render_bench_report(result: Mapping[str, Any]) -> str:
    """The whole page for one bench."""
    first, *others = bench_sentences(result)
    groups, status = bench_groups(result), str(result.get("status") or "")
    settings = mapping(result.get("settings"))
    marks = _mark("synthetic weights") if any(row.get("synthetic") for group in groups for row in group.rows) else ""
    marks += _mark("quick: few rounds, rough figures") if settings.get("quick") else ""
    model = f" · {escape(settings['model'])}" if settings.get("model") else ""
    state = escape(words.STATUS_WORDS.get(status, status))
    header = (
        f"<p class='eyebrow'>wasi-edge bench{model}</p><h1>{glued(first)}</h1>"
        f"{''.join(f'<p>{glued(sentence)}</p>' for sentence in others)}"
        f"<p class='status {escape(status)}'>{state}</p>{marks}"
    )
    sections = (
        _methods(groups),
        _against_epsilon(groups),
        _time_and_memory(groups),
        _gradient_errors(groups),
        _paper(groups),
        _cost_model(mapping(result.get("cost_model"))),
        _machine(mapping(result.get("hardware"))),
        _details(result, groups),
    )
    footer = "Measured on your own machine; nothing left it. What --json prints holds every figure."
    return document(glued(first), header, "".join(sections), footer, _CSS)


# ---- tables of methods -------------------------------------------------------------------------


def _of(key: str, text: Callable[[object], str] = figure, inside: str = "") -> Cell:
    """A cell from one key of the row, or of the dictionary `inside` it."""
    return lambda row, _: text((mapping(row.get(inside)) if inside else row).get(key))


def _two_places(value: object) -> str:
    return figure(value, 2)


def _gflop(value: object) -> str:
    return count_text(value, "FLOP")


def _memory_share(row: Row, group: BenchGroup) -> str:
    return _two_places(share(row.get("peak_rss_bytes"), group.vanilla.get("peak_rss_bytes")))


def _paper_memory_share(row: Row, group: BenchGroup) -> str:
    """As given, else from the bytes."""
    counted, vanilla = mapping(row.get("paper")), mapping(group.vanilla.get("paper"))
    given = finite(counted.get("memory_ratio"))
    return _two_places(share(counted.get("memory_bytes"), vanilla.get("memory_bytes")) if given is None else given)


def _fewer(key: str) -> Cell:
    """How many times fewer than vanilla's, on paper."""
    return lambda row, group: _two_places(
        share(mapping(group.vanilla.get("paper")).get(key), mapping(row.get("paper")).get(key))
    )


_SPEED: Sequence[tuple[str, Cell]] = (
    ("train ×", _of("train_speedup", _two_places)),
    ("spread", lambda row, _: spread_text(row, "train_speedup_spread")),
    ("bound", _of("train_bound", _two_places)),
    ("infer ×", _of("infer_speedup", _two_places)),
    ("spread", lambda row, _: spread_text(row, "infer_speedup_spread")),
    ("bound", _of("infer_bound", _two_places)),
    ("train, ms/image", _of("train_ms_per_image")),
    ("infer, ms/image", _of("infer_ms_per_image")),
    ("gradient error", _of("gradient_error", _two_places)),
    ("peak memory", _of("peak_rss_bytes", size_text)),
)
_TAKES: Sequence[tuple[str, Cell]] = (
    ("memory, of vanilla's", _memory_share),
    ("upkeep, of the step", _of("upkeep_fraction", words.percent)),
    ("window copies, of the step", _of("window_copies_fraction", words.percent)),
    ("gradient rank", _of("rank", lambda value: figure(value, 0))),
    ("parameters trained", _of("trainable_parameters", count_text)),
    ("parameters stored", _of("stored_parameters", count_text)),
    ("watts", _of("watts")),
    ("J/image", _of("joules_per_image")),
    ("samples", _of("samples", lambda value: figure(value, 0))),
    ("plan", _of("plan", lambda value: words.figure_text("plan", value) or _MISSING)),
)
_ON_PAPER: Sequence[tuple[str, Cell]] = (
    ("training, on paper", _of("train_flops", _gflop, "paper")),
    ("fewer by ×", _fewer("train_flops")),
    ("faster by ×, measured", _of("train_speedup", _two_places)),
    ("inference, on paper", _of("infer_flops", _gflop, "paper")),
    ("fewer by ×", _fewer("infer_flops")),
    ("faster by ×, measured", _of("infer_speedup", _two_places)),
    ("upkeep, on paper", _of("upkeep_flops", _gflop, "paper")),
    ("memory, on paper", _of("memory_bytes", size_text, "paper")),
    ("of vanilla's, on paper", _paper_memory_share),
    ("process memory, measured", _of("peak_rss_bytes", size_text)),
    ("of vanilla's, measured", _memory_share),
)
_COUNTED: Sequence[tuple[str, Cell]] = (
    ("training", _of("train", _gflop, "flops")),
    ("inference", _of("infer", _gflop, "flops")),
    ("upkeep", _of("upkeep", _gflop, "flops")),
)


def _table_of(group: BenchGroup, columns: Sequence[tuple[str, Cell]]) -> str:
    """One line a row; a column that knows nothing is left out, and so is a table without columns."""
    cells = [(title, [cell(row, group) for row in group.rows]) for title, cell in columns]
    cells = [(title, column) for title, column in cells if any(text != _MISSING for text in column)]
    if not cells:
        return ""
    names = [_name(row, group) for row in group.rows]
    rows = [[name, *(column[i] for _, column in cells)] for i, name in enumerate(names)]
    return table(["method", *(title for title, _ in cells)], rows, numeric=True)


def _name(row: Row, group: BenchGroup) -> str:
    """The row's name, marked where only some rows of its group are synthetic."""
    marked = row.get("synthetic") and not all(other.get("synthetic") for other in group.rows)
    return row_name(row) + (" synthetic" if marked else "")


def _heading(group: BenchGroup) -> str:
    marked = group.rows and all(row.get("synthetic") for row in group.rows)
    return f"<h3>{escape(group.title)}{' ' + _mark('synthetic') if marked else ''}</h3>"


def _mark(text: str) -> str:
    return f"<span class='mark'>{escape(text)}</span>"


def _by_group(groups: Sequence[BenchGroup], body: Callable[[BenchGroup], str]) -> str:
    """What `body` says of each group under that group's heading, where it says anything."""
    return "".join(_heading(group) + text for group in groups if (text := body(group)))


def _note(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"


def _methods(groups: Sequence[BenchGroup]) -> str:
    body = _by_group(groups, lambda group: _table_of(group, _SPEED) + _table_of(group, _TAKES))
    marked = any(row.get("synthetic") for group in groups for row in group.rows)
    notes = _note(_METHODS_NOTE) + (_note(_SYNTHETIC_NOTE) if marked else "")
    return section("Methods", body + notes if body else "")


def _paper(groups: Sequence[BenchGroup]) -> str:
    if not any(mapping(row.get("paper")) for group in groups for row in group.rows):
        return ""
    return section("As the paper counts, and as measured",
                   _by_group(groups, lambda group: _table_of(group, _ON_PAPER)) + _note(_PAPER_NOTE))  # fmt: skip


def _gradient_errors(groups: Sequence[BenchGroup]) -> str:
    def errors(group: BenchGroup) -> str:
        known = [row for row in group.rows if mapping(row.get("gradient_error_by_kind"))]
        if not known:
            return ""
        found = {str(kind) for row in known for kind in mapping(row.get("gradient_error_by_kind"))}
        kinds = [kind for kind in _KINDS if kind in found] + sorted(found.difference(_KINDS))
        columns = [(kind, _of(kind, _two_places, "gradient_error_by_kind")) for kind in kinds]
        return _table_of(group._replace(rows=known), [*columns, ("all", _of("gradient_error", _two_places))])

    body = _by_group(
        [group for group in groups if any(row.get("gradient_error_by_kind") for row in group.rows)], errors
    )
    note = "The relative error of the weight gradient by kind of layer, on real photos: ||dW − dW'|| / ||dW||."
    return section("What compression does to the gradient", body + _note(note) if body else "")


# ---- plots -------------------------------------------------------------------------------------


def _against_epsilon(groups: Sequence[BenchGroup]) -> str:
    def plots(group: BenchGroup) -> str:
        return _grid([speed_chart(group, "train"), speed_chart(group, "infer"), memory_chart(group)])

    return section("Speed and memory against epsilon", _by_group(groups, plots))


def _time_and_memory(groups: Sequence[BenchGroup]) -> str:
    body = _by_group(groups, lambda group: _grid([pareto_chart(group)]))
    note = "Down and to the left is better. A method on the dashed steps is beaten on both by no other."
    return section("Time and memory", body + _note(note) if body else "")


def _grid(charts: Sequence[str]) -> str:
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f"<div class='grid'>{figures}</div>" if figures else ""


# ---- the cost model ----------------------------------------------------------------------------


def _cost_model(model: Mapping[str, Any]) -> str:
    measured = mappings(model.get("measurements"))
    chart = prediction_chart(measured)
    plot = f"<figure>{chart}</figure>" if chart else ""
    terms = _rows_table(model.get("terms"), ("method", "term", "ms_per_unit", "unit"))
    body = f"<div class='grid'>{plot}{f'<div>{terms}</div>' if terms else ''}</div>" if plot or terms else ""
    error = finite(model.get("median_error"))
    median = f"<p>The median error of a prediction is {words.percent(error)}.</p>" if error is not None else ""
    keys = ("method", "tokens", "width", "depth", "rank_share", "batch", "train_ms_per_image", "predicted_ms_per_image")
    every = folded("Every measurement", _rows_table(measured, keys))
    return section("How time grows, and where WASI stops paying",
                   median + _break_even(mapping(model.get("break_even"))) + body + every)  # fmt: skip


def _break_even(found: Mapping[str, Any]) -> str:
    rank, batch = finite(found.get("rank_share")), finite(found.get("batch"))
    terms = [f"a rank share (K over the smaller side) of {figure(rank, 2)}"] if rank is not None else []
    terms += [f"a batch of {number_text(batch)}"] if batch is not None else []
    clauses = [f"WASI breaks even at {' and at '.join(terms)}"] if terms else []
    clauses += [str(found["note"]).rstrip(".")] if found.get("note") else []
    return f"<p>{escape('; '.join(clauses))}.</p>" if clauses else ""


def _rows_table(rows: object, keys: Sequence[str]) -> str:
    """A list of dictionaries as a table, with those of `keys` that some row knows."""
    found = mappings(rows)
    known = [key for key in keys if any(row.get(key) is not None for row in found)]
    cells = [[words.figure_text(key, row.get(key)) for key in known] for row in found] if known else []
    return table([key.replace("_per_", "/").replace("_", " ") for key in known], cells, numeric=True)


# ---- machine and details -----------------------------------------------------------------------


def _machine(hardware: Mapping[str, Any]) -> str:
    before, after = mapping(hardware.get("before")), mapping(hardware.get("after"))
    keys = list(dict.fromkeys([*before, *after]))
    rows = [(words.label_text(key).replace(" celsius", ""), *(_state(key, at.get(key)) for at in (before, after)))
            for key in keys]  # fmt: skip
    warning = (
        "<p class='warn'>The machine was slowed down (throttled). Ratios still hold, since the methods took turns; "
        "milliseconds do not.</p>"
        if _was_throttled(before.get("throttled"), after.get("throttled"))
        else ""
    )
    facts = words.figures({key: value for key, value in hardware.items() if key not in ("before", "after")})
    tables = [table(("", ""), facts), table(("", "before", "after"), rows)]
    parts = "".join(f"<div>{part}</div>" for part in tables if part)
    return section("The machine", warning + (f"<div class='grid'>{parts}</div>" if parts else ""))


def _state(key: str, value: object) -> str:
    """A state of the machine; throttling comes as a yes or no, or as the Pi's bits ("0x50000")."""
    number = finite(value)
    if key == "throttled" and (bits := _bits(value)) is not None:
        return f"{bits:#x}" if bits else "no"
    if key == "temperature_celsius" and number is not None:
        return f"{number:.1f} °C"
    return words.figure_text(key, value)


def _bits(value: object) -> int | None:
    if (number := finite(value)) is not None:
        return int(number)
    match = re.fullmatch(r"(?:throttled=)?0x([0-9a-fA-F]+)", str(value))
    return int(match[1], 16) if match else None


def _was_throttled(before: object, after: object) -> bool:
    """Whether it was during the bench: bits 0 to 3 say "now", those above "since boot"."""
    bits = _bits(after)
    if bits is not None:
        return bool(bits & 0xF or bits & ~(_bits(before) or 0))
    return _state("throttled", after) not in (_MISSING, "no", "none")


def _details(result: Mapping[str, Any], groups: Sequence[BenchGroup]) -> str:
    parts = [
        folded("Settings", table(("", ""), words.figures(mapping(result.get("settings"))))),
        folded("Versions", table(("", ""), words.figures(mapping(result.get("versions"))))),
        folded("Ranks of the factors", _ranks(groups)),
        folded("FLOPs per image, everything counted: what the bounds are made of",
               _by_group(groups, lambda group: _table_of(group, _COUNTED))),
    ]  # fmt: skip
    return section("In detail", "".join(parts))


def _ranks(groups: Sequence[BenchGroup]) -> str:
    """The lowest and highest rank of each kind of layer, once for each model, method and epsilon."""
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    for group in groups:
        for row in group.rows:
            kinds: dict[str, list[float]] = {}
            for layer, rank in mapping(row.get("ranks")).items():
                if (known := finite(rank)) is not None:
                    kinds.setdefault(str(layer).rsplit(".", 1)[-1], []).append(known)
            if kinds:
                rows.setdefault((group.model, row_name(row)), kinds)
    found = {kind for kinds in rows.values() for kind in kinds}
    columns = [kind for kind in _KINDS if kind in found] + sorted(found.difference(_KINDS))
    many = len({model for model, _ in rows}) > 1
    cells = [
        [f"{name}, {model}" if many else name, *(_range(kinds.get(kind, ())) for kind in columns)]
        for (model, name), kinds in rows.items()
    ]
    return table(["method", *columns], cells, numeric=True)


def _range(values: Sequence[float]) -> str:
    if not values:
        return _MISSING
    low, high = min(values), max(values)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


_CSS = """
.mark{display:inline-block;margin:0 .3rem 1rem;padding:.1rem .7rem;border-radius:99px;background:var(--bad);
color:var(--on-shade);font-size:.875rem;font-weight:400}h3 .mark{margin:0 0 0 .3rem}
.warn{color:var(--bad);font-weight:600;margin:0 0 1rem}.scroll+.scroll{margin-top:1rem}
.numeric th:first-child{position:sticky;left:0;background:var(--card);min-width:6em}
"""
