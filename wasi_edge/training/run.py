"""The whole of `wasi-edge finetune`, in the order things happen to a photo.

    headers -> plan -> pixels on disk -> (torch) -> closed-form head -> gradient steps -> best model -> report

`plan_run` ends after the plan. A run that was interrupted, killed or cut off is gone on with by `resume`.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from wasi_edge.atomic import write_json_atomic
from wasi_edge.data.cache import PhotoCache, build_cache
from wasi_edge.data.folder import require_classes
from wasi_edge.errors import Interrupted, NoUsableData
from wasi_edge.memory.malloc import tune_malloc
from wasi_edge.memory.process import MemoryWatch, read_memory
from wasi_edge.training.onnx_result import add_onnx
from wasi_edge.training.prepare import Prepared, prepare
from wasi_edge.training.report_keys import base_report
from wasi_edge.training.request import Events, FinetuneRequest
from wasi_edge.training.resume import completed_report, recorded_plan, run_record, with_recorded_optimizer
from wasi_edge.training.signals import StopSignals
from wasi_edge.units import format_size

# what decoding may not use: the interpreter's own growth while it decodes
_DECODE_RESERVE_BYTES = 24 * 2**20


def plan_run(request: FinetuneRequest, events: Events) -> dict[str, Any]:
    """What `finetune` would do: its report with status 'planned'. Nothing is written."""
    tune_malloc()
    with MemoryWatch() as watch:
        prepared = prepare(request, events)
        return base_report(prepared, "planned", watch)


def finetune(request: FinetuneRequest, events: Events) -> dict[str, Any]:
    """Run, or go on with, one fine-tuning; returns the content of report.json.

    Raises WasiEdgeError for everything that a user can mend; what was saved before stays.
    """
    began = time.monotonic()
    tune_malloc()
    if request.resume and (report := completed_report(request)) is not None:
        events.message(f"{request.out} is complete; nothing is left to do")
        return report
    with StopSignals() as signals, MemoryWatch() as watch:
        prepared = prepare(with_recorded_optimizer(request), events, lambda: signals.received is not None)
        prepared, resuming = recorded_plan(prepared, events)
        work_folder = request.out / "checkpoint"
        _make(work_folder, resuming)
        write_json_atomic(work_folder / "run.json", run_record(prepared))
        try:
            cache = _decode(prepared, work_folder / "photos", events, signals)
            with cache:
                # torch is imported here, when decoding is over
                from wasi_edge.training.session import Session

                session = Session(prepared, cache, work_folder, events, signals, watch, began)
                report, sample = session.run(), session.sample
                del session  # and with it what torch holds
            return report if sample is None else add_onnx(report, request.out, sample, watch, events)
        except Interrupted as stopped:
            events.message(str(stopped))
            return {**base_report(prepared, "interrupted", watch), "error": str(stopped)}


def _make(work_folder: Path, resuming: bool) -> None:
    if not resuming:
        # --resume without a checkpoint starts anew: nothing of an earlier attempt may be mistaken for this one's
        shutil.rmtree(work_folder / "model", ignore_errors=True)
    work_folder.mkdir(parents=True, exist_ok=True)


def _decode(prepared: Prepared, folder: Path, events: Events, signals: StopSignals) -> PhotoCache:
    """Every photo into the on-disk cache, within what the budget leaves."""
    photos = prepared.folder.photos
    events.stage("reading photos", len(photos))

    def advance(done: int, _: int) -> None:
        if signals.received:
            raise Interrupted("stopped while reading photos; --resume reads the rest")
        events.advance(done)

    free = prepared.request.budget_bytes - read_memory().rss_bytes - _DECODE_RESERVE_BYTES
    cache = build_cache(
        photos,
        folder,
        prepared.model.preprocessing,
        max(free, 2**20),
        prepared.threads,
        on_progress=advance,
    )
    minimum = 1 if prepared.model.is_run else 2
    try:
        require_classes(
            sorted({photo.label for photo in photos}), cache.labels, min_classes=minimum, min_photos_per_class=2
        )
    except NoUsableData:
        cache.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if cache.skipped:
        events.message(f"{len(cache.skipped)} photos cannot be used; the report lists them")
    events.message(f"{len(cache)} photos ready ({format_size(os.path.getsize(folder / 'pixels.bin'))} on disk)")
    return cache
