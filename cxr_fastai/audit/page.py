"""An audit for people: tables on the terminal, and one HTML page with the films, which opens offline."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_fastai.audit.scan import Scan
from cxr_fastai.images import printable
from cxr_fastai.runs import write_text

if TYPE_CHECKING:
    from cxr_fastai.audit import Audit
    from cxr_fastai.console import Console

FILMS_SHOWN = 8
LABELS_SHOWN = 12
TEMPLATES = Path(__file__).parents[1] / "templates"


def verdict(audit: "Audit") -> str:
    """Return the outcome in a sentence."""
    errors = sum(finding.severity == "error" for finding in audit.findings)
    warnings = sum(finding.severity == "warning" for finding in audit.findings)
    if errors:
        return f"{errors} finding(s) would make figures from these films wrong, {warnings} may mislead"
    return f"nothing that makes figures wrong; {warnings} finding(s) that may mislead" if warnings else "nothing found"


def show_audit(audit: "Audit", console: "Console") -> None:
    """Print counts, findings and probes."""
    from rich.markup import escape
    from rich.table import Table

    labels = ", ".join(f"{printable(str(name))} {n}" for name, n in audit.counts["labels"].items())
    console.say(f"{audit.n} films of {audit.counts['patients']} patients: {labels}")
    found = Table(title=f"Audit: {verdict(audit)}", title_justify="left")
    for head in ("severity", "kind", "finding"):
        found.add_column(head, overflow="fold")
    for finding in audit.findings:
        found.add_row(finding.severity, finding.kind, escape(printable(finding.detail)))
    console.rich.print(found)
    if audit.shortcuts:
        probes = Table(title="What tells the label without anatomy (0.5: nothing)", title_justify="left")
        for head in ("probe", "AUROC", "p", "verdict"):
            probes.add_column(head, justify="right" if head in ("AUROC", "p") else "left", overflow="fold")
        for name, p in audit.shortcuts.items():
            probes.add_row(name, f"{p.auroc:.2f}", f"{p.p:.3f}", "SHORTCUT" if p.flagged else "")
        console.rich.print(probes)


def write_page(audit: "Audit", scan: Scan, path: Path) -> None:
    """Write the page: findings with their films, probes, doubtful labels, counts; nothing is fetched when it opens."""
    import jinja2

    rows = {film: row for row, film in enumerate(scan.table["path"])}

    def film(name: str) -> dict[str, str]:
        pixels = scan.thumbnails[rows[name]]
        return {"name": printable(Path(name).name), "picture": _picture(pixels) if np.isfinite(pixels).all() else ""}

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    findings: list[dict[str, Any]] = [
        {"severity": f.severity, "kind": f.kind, "detail": printable(f.detail),
         "more": max(0, len(f.paths) - FILMS_SHOWN),
         "films": [film(name) for name in f.paths[:FILMS_SHOWN] if name in rows]}
        for f in audit.findings
    ]  # fmt: skip
    labels = [{**film(i.path), "label": i.label or "no finding", "suggested": i.suggested or "no finding",
               "quality": i.quality} for i in audit.labels[:LABELS_SHOWN]]  # fmt: skip
    text = environment.get_template("audit.html").render(
        title=printable(str(scan.table.attrs.get("source", "films"))), verdict=verdict(audit), counts=audit.counts,
        findings=findings, probes=list(audit.shortcuts.values()), labels=labels,
    )  # fmt: skip
    write_text(path, text)


def _picture(pixels: np.ndarray) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
