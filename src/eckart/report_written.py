"""What stands beside the weights of a model that a command wrote, whatever the command was."""

from pathlib import Path

from . import hub, report, report_healing, report_sharing
from .joined import Joined, Tied
from .modelcard import Facts
from .result import Healed, Result


def told(
    result: Result | Healed | Tied, folder: Path, source: str | Path | None, licence: str | None
) -> tuple[dict[str, str], Facts]:
    """Return the texts to stand beside the weights in `folder`, and what the card says beside them.

    Args:
        result: what was done.
        folder: holds the weights already.
        source: the folder that was healed, tied or untied; default: what the result names.
        licence: of the texts that were used.
    """
    known = report_healing.known(source)
    if isinstance(result, Healed):
        return report_healing.documents(result, known), report_healing.facts(
            result, str(source or result.source), licence
        )
    if isinstance(result, Tied):
        return report_sharing.tied_documents(result, known), report_sharing.tied_facts(
            result, str(source or result.source), licence
        )
    measured = result.with_file_bytes(hub.weight_bytes(folder))
    if isinstance(measured, Joined):
        return report_sharing.documents(measured), report_sharing.facts(measured, licence)
    return report.documents(measured), report.facts(measured, licence)
