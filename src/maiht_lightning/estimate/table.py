"""The table of a prediction."""

from rich.table import Table

from ..reporting.formats import duration, memory
from .plan import Estimate


def phase_table(found: Estimate, title: str) -> Table:
    """Show one row per phase, and what the run needs beside the device."""
    table = Table("phase", title=title, min_width=len(title) + 2)
    for heading in ("PFLOP", "time", "memory"):
        table.add_column(heading, justify="right")
    for phase in found.phases:
        table.add_row(phase.name, f"{phase.flops / 1e15:.3g}", duration(phase.seconds), memory(phase.device_bytes))
    table.add_section()
    total = sum(phase.seconds for phase in found.phases)
    table.add_row("in all", f"{found.flops / 1e15:.3g}", duration(total), memory(found.peak.device_bytes))
    table.add_row("host memory beside", "", "", memory(found.host_bytes))
    table.add_row("disk: model and journal", "", "", memory(found.disk_bytes))
    return table
