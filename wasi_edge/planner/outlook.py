"""What a model would take to train under the budgets that people name, before any photo or torch is there. No torch.

The plan of a real run, with what cannot be known yet taken as usual: the libraries' memory as measured with
torch's CPU build, two hundred photos. A run measures all of that first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wasi_edge.errors import BudgetInfeasible
from wasi_edge.method import Method
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.planner.choices import CACHED_VIEWS, usual_blocks
from wasi_edge.planner.plan import Base, Speed, Work, choose_plan
from wasi_edge.planner.workload import Workload

BUDGETS = tuple(size * 2**20 for size in (256, 384, 512, 768, 1024))
# measured: 210 to 220 MB while steps run, 300 MB while the libraries are measured and imported
USUAL_BASE = Base(start=300 * 2**20, steady=217 * 2**20)
# seconds; only their ratios decide what is fastest
_USUAL_SPEED = Speed(train_seconds=0.1, infer_seconds=0.035, update_seconds=0.1, decode_seconds=0.01)
_BATCH, _GRADIENT_RANK, _EPOCHS, _CLASSES, _TRAINED_SHARE = 16, 32, 12, 10, 0.5


def outlook(
    geometry: Geometry, image_size: int, ranks: Mapping[str, int | None], resize_side: int, base: Base = USUAL_BASE
) -> list[dict[str, Any]]:
    """For each budget (bytes) the expected peak, how many blocks would learn, how many photos at a time, at what
    gradient rank; or the smallest budget that would do. `ranks` None where a linear is trained dense."""
    load = Workload(
        geometry=geometry,
        image_size=image_size,
        ranks=ranks,
        num_classes=_CLASSES,
        method=Method.WASI,
        augment_photo_bytes=3 * 2 * resize_side**2,
    )
    work = Work(
        num_train=200,
        num_val=50,
        epochs=_EPOCHS,
        batch=_BATCH,
        gradient_rank=_GRADIENT_RANK,
        blocks=usual_blocks(Method.WASI, geometry.depth, _TRAINED_SHARE),
        blocks_named=False,
        cached_views=CACHED_VIEWS,
    )
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        try:
            plan = choose_plan(load, work, base, budget, _USUAL_SPEED)
        except BudgetInfeasible as error:
            rows.append({"budget_bytes": budget, "smallest_budget_bytes": error.smallest_feasible_budget_bytes})
            continue
        rows.append(
            {
                "budget_bytes": budget,
                "peak_bytes": plan.peak_bytes,
                "trained_blocks": plan.trained_blocks,
                "micro_batch": plan.micro_batch,
                "gradient_rank": plan.gradient_rank,
            }
        )
    return rows
