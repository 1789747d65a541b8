"""What a run writes down about itself so that it can be gone on with, and how an interrupted one is found again.

`checkpoint/run.json` holds the choices that decide the result, and the plan. A resumed run keeps both: another value
for one of them is an error, a budget that the plan no longer fits is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from wasi_edge.data.folder import PhotoFolder
from wasi_edge.errors import BudgetInfeasible, UsageError
from wasi_edge.method import Optimizer
from wasi_edge.planner.memory import Item
from wasi_edge.planner.plan import NAMED_MARGIN_BYTES, START_ITEM, STEADY_ITEM, Plan
from wasi_edge.training.prepare import Prepared, with_plan
from wasi_edge.training.request import Events, FinetuneRequest
from wasi_edge.units import format_size

_FINISHED = ("completed", "early_stopped")


def run_record(prepared: Prepared) -> dict[str, Any]:
    """The content of run.json."""
    plan = prepared.plan
    return {
        "choices": _choices(prepared),
        "plan": {**plan.to_dict(), "peak_bytes": plan.peak_bytes, "seconds": plan.seconds},
    }


def completed_report(request: FinetuneRequest) -> dict[str, Any] | None:
    """The report of a run that is already complete in `request.out`, None otherwise."""
    report = read_json(request.out / "report.json")
    if report is None or report.get("status") not in _FINISHED:
        return None
    return report


def with_recorded_optimizer(request: FinetuneRequest) -> FinetuneRequest:
    """`request`, naming the rule that the run it goes on with began with, unless it names one: which rule a new run
    takes depends on its time limit, and that may be another now."""
    record = _record_to_resume(request)
    if record is None or request.optimizer is not None or not request.method.is_explicit:
        return request
    recorded = record["choices"].get("optimizer", Optimizer.POLAR)
    return dataclasses.replace(request, optimizer=Optimizer(recorded))


def recorded_plan(prepared: Prepared, events: Events) -> tuple[Prepared, bool]:
    """`prepared` under the plan that the run in OUT began with, and whether there is such a run.

    Raises UsageError if the command asks for something else than that run did, BudgetInfeasible if its plan no longer
    fits the budget.
    """
    request = prepared.request
    record = _record_to_resume(request)
    if record is None:
        return prepared, False
    now, then = _choices(prepared), record["choices"]
    changed = [key for key in now if now[key] != then.get(key)]
    if "photos_found" in changed:
        raise UsageError(
            f"the photos in {request.photos} are not those that {request.out} was begun with: finish that run with the "
            f"photos it knows, or start another one (--model {request.out} goes on from its best model so far)"
        )
    if changed:
        listed = ", ".join(f"{key} (was {then.get(key)}, now {now[key]})" for key in changed)
        raise UsageError(f"{request.out} was begun with other choices: {listed}; use the same, or another --out")
    stored = dict(record["plan"])
    if unknown := set(prepared.plan.choices()) - set(stored):
        raise UsageError(
            f"{request.out} was begun by another version of wasi-edge (its plan lacks {', '.join(sorted(unknown))}): "
            "finish it with that one, or use another --out"
        )
    items = tuple(Item(entry["item"], entry["bytes"]) for entry in stored["memory"])
    # libraries may weigh something else today; the rest of the plan is arithmetic
    weighed = {STEADY_ITEM: prepared.base.steady, START_ITEM: prepared.base.start}
    items = tuple(Item(item.item, weighed.get(item.item, item.bytes)) for item in items)
    plan = Plan(
        method=stored["method"],
        image_size=stored["image_size"],
        accumulation=stored["accumulation"],
        **{key: stored[key] for key in prepared.plan.choices()},
        epochs=stored["epochs"],
        peak_bytes=sum(item.bytes for item in items),
        seconds=stored["seconds"],
        items=items,
    )
    # a few pages more today are no reason to refuse what fitted yesterday: the watchdog sees to them
    if plan.peak_bytes > request.budget_bytes + NAMED_MARGIN_BYTES:
        raise BudgetInfeasible(
            f"the run in {request.out} goes on with the plan it began with, which needs "
            f"{format_size(plan.peak_bytes)}; the budget is {format_size(request.budget_bytes)}",
            plan.peak_bytes,
        )
    if plan != prepared.plan:
        events.message("going on with the plan the run began with")
    return with_plan(prepared, plan), True


def _choices(prepared: Prepared) -> dict[str, Any]:
    """What decides the result of a run."""
    request, work = prepared.request, prepared.work
    return {
        "photos": str(Path(request.photos).resolve()),
        "photos_found": photos_digest(prepared.folder, request.photos),
        "model": str(prepared.model.folder.resolve()),
        "method": str(request.method),
        "epochs": work.epochs,
        "batch": work.batch,
        "epsilon": prepared.model.epsilon,
        "val_split": request.val_split,
        "seed": request.seed,
        "image_size": prepared.model.preprocessing.image_size,
        "lr": request.learning_rate,
        "train_blocks": request.train_blocks,
        "rank": request.gradient_rank,
        "optimizer": str(work.optimizer),
    }


def _record_to_resume(request: FinetuneRequest) -> dict[str, Any] | None:
    """run.json of the run that `request` goes on with, None where it starts one."""
    root = request.out / "checkpoint"
    record = read_json(root / "run.json")
    return record if request.resume and any(root.glob("step-*/manifest.json")) else None


def photos_digest(folder: PhotoFolder, root: Path) -> str:
    """A digest of the photos' names, classes, parts and sizes in bytes: another folder is another split."""
    digest = hashlib.sha256()
    for photo in folder.photos:
        try:
            size = photo.path.stat().st_size
        except OSError:
            size = -1
        entry = (os.path.relpath(photo.path, root), photo.label, photo.part, size)
        digest.update(repr(entry).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
