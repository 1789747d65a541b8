"""The keys of report.json (the contract) with what is known before training. No torch."""

from __future__ import annotations

from typing import Any

from wasi_edge.memory.hardware import hardware, versions
from wasi_edge.memory.process import MemoryWatch
from wasi_edge.training.prepare import Prepared


def base_report(prepared: Prepared, status: str, watch: MemoryWatch) -> dict[str, Any]:
    """The report's keys with what is known before training."""
    request, plan, model = prepared.request, prepared.plan, prepared.model
    return {
        "status": status,
        "model": model.name,
        "method": str(request.method),
        "quality": str(request.quality),
        "epsilon": model.epsilon,
        "budget_bytes": request.budget_bytes,
        "planned_peak_rss_bytes": plan.peak_bytes,
        "peak_rss_bytes": watch.peak_rss_bytes,
        "peak_swap_bytes": watch.peak_swap_bytes,
        "plan": plan.to_dict(),
        "planned_seconds": round(plan.seconds, 1),
        "trained_blocks": plan.trained_blocks,
        "effective_batch": prepared.work.batch,
        "optimizer": str(prepared.work.optimizer) if request.method.is_explicit else None,
        "optimizer_steps": 0,
        "resumed_from_step": None,
        "classes": list(prepared.labels),
        "num_train_images": prepared.work.num_train,
        "num_val_images": prepared.work.num_val,
        "skipped_files": [{"path": s.path, "reason": s.reason} for s in prepared.folder.skipped],
        "epochs_run": 0,
        "epochs_planned": plan.epochs,
        "train_seconds": 0.0,
        "images_per_second": None,
        "head_only_val_accuracy": None,
        "best_val_accuracy": None,
        "final_val_accuracy": None,
        "history": [],
        "seed": request.seed,
        "versions": versions(),
        "hardware": hardware(),
    }
