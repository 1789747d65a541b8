"""`wasi-edge doctor`: whether this machine is fit for training, and what to do where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wasi_edge.cli import console


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Examine this machine and what is installed on it."""
    from wasi_edge.doctor.finding import Status
    from wasi_edge.doctor.machine import Machine, examine_machine
    from wasi_edge.doctor.software import examine_software

    findings = [*examine_machine(Machine()), *examine_software(Path.cwd())]
    worst = max((finding.status for finding in findings), key=list(Status).index)
    result: dict[str, Any] = {"status": str(worst), "findings": [finding.to_dict() for finding in findings]}
    if as_json:
        console.print_json(result)
    else:
        from wasi_edge.report.terminal import doctor_table

        console.stdout_console().print(doctor_table(result["findings"]))
    if worst is Status.BAD:
        raise typer.Exit(1)
