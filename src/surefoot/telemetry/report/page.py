"""Putting the page together: markup, style, script and data in one file that asks the network for nothing."""

import html
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from surefoot.telemetry.report.condense import QUANTITIES, Curves, Heat
from surefoot.telemetry.report.findings import RULE_OF_THUMB, Finding

_TITLES = {
    "grad": "gradient norm",
    "update_ratio": "update / weights",
    "update": "update norm",
    "param": "weight norm",
    "max_grad": "largest |gradient|",
}


def render_page(name: str, findings: Sequence[Finding], curves: Curves, heat: Heat) -> str:
    """Return the page.

    Args:
        name: the run's file.
        findings: what stands on top, in words.
        curves: the totals.
        heat: the parameters.
    """
    parts = {
        "TITLE": html.escape(name),
        "SUMMARY": html.escape(_summary(curves, heat)),
        "FINDINGS": "\n".join(map(_finding, findings)),
        "STYLE": _resource("page.css"),
        "SCRIPT": _resource("page.js"),
        "DATA": _embedded({"charts": _charts(curves), "steps": _steps(curves), "heat": _heat(heat)}),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _resource("page.html"))


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _embedded(content: dict[str, Any]) -> str:
    """Write JSON that no browser takes for the end of the script it stands in."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _summary(curves: Curves, heat: Heat) -> str:
    first, last, count = curves.steps[0], curves.steps[-1], len(curves.steps)
    measured = f"{count:,} of them measured" if count != last - first + 1 else "each measured"
    return f"steps {first:,} to {last:,}, {measured}; {len(heat.names):,} parameters; surefoot {version('surefoot')}"


def _finding(finding: Finding) -> str:
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(finding.text))
    return f'<li class="{finding.kind}"><h2>{html.escape(finding.title)}</h2><p>{text}</p></li>'


def _steps(curves: Curves) -> dict[str, list[int]]:
    """Return the first and the last step of each point of the curves."""
    bounds = curves.bounds()
    return {
        "first": [curves.steps[start] for start in bounds[:-1]],
        "last": [curves.steps[end - 1] for end in bounds[1:]],
    }


def _charts(curves: Curves) -> list[dict[str, Any]]:
    """Describe the charts; those that would only show that nothing happened are left out."""
    lr = ["lr_low", "lr_high"] if (curves["lr_low"] != curves["lr_high"]).any() else ["lr_low"]
    charts = [
        _chart(curves, "gradient norm, before clipping", ["grad"], log=True),
        _chart(curves, "update / weights", ["update_ratio"], log=True, guide=RULE_OF_THUMB),
        _chart(curves, "learning rate" if len(lr) == 1 else "learning rates, least and greatest", lr),
    ]
    if (curves["clip"] != 1).any():
        charts.append(_chart(curves, "clip factor", ["clip"]))
    if curves["skipped"].any():
        charts.append(_chart(curves, "steps skipped so far", ["skipped"]))
    return [*charts, _chart(curves, "step time, seconds", ["seconds"], log=True)]


def _chart(
    curves: Curves, title: str, names: Sequence[str], *, log: bool = False, guide: float | None = None
) -> dict[str, Any]:
    return {"title": title, "lines": [curves.points(name) for name in names], "log": log, "guide": guide}


def _heat(heat: Heat) -> dict[str, Any]:
    maps = [{"title": _TITLES[quantity], **heat.coded(quantity)} for quantity in QUANTITIES]
    return {"rows": heat.rows(), "starts": heat.starts, "last": heat.last, "maps": maps}
