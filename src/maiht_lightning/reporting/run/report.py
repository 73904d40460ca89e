"""A run's figures and page, which must never cost the run."""

import shlex
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ...records import LayerRecord
from ..environment import environment
from ..summary import Summary
from .figures import draw_figures
from .page import write_page


def write_report(
    folder: Path, summary: Summary, records: list[LayerRecord], settings: dict[str, Any]
) -> dict[str, Path]:
    """Write `figures/*.png` and `report.html` into a run's folder; what fails becomes a warning.

    Returns:
        The figures by name; none if they could not be drawn.
    """
    figures: dict[str, Path] = {}
    try:
        figures = draw_figures(folder / "figures", summary, records)
        write_page(folder, summary, records, figures, settings, environment(), command())
    except Exception as error:
        rank_zero_warn(f"the report in {folder} could not be written: {error!r}. The pruned model is saved.")
    return figures


def command() -> str:
    """The command that started this process."""
    program = Path(sys.argv[0]).name
    return shlex.join([*([] if program == "maiht" else ["python"]), program, *sys.argv[1:]])
