"""One page of a round: environment, tables and pictures in a single HTML file that needs nothing beside it."""

import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import compare, harness, plots, roofline

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
td, th { padding: 2px 10px; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th { text-align: left }
svg { max-width: 100%; height: auto }
h2 { margin-top: 2em }
"""
TUNING_COLUMNS = ("entry", "present", "best", "present_ms", "best_ms", "ratio", "better")
KERNEL_NUMBERS = ("y_value_50", "y_value_20", "y_value_80", "fraction_of_roof")


def write(directory: Path, state: Mapping[str, str]) -> Path:
    """DIR/report.html of what DIR holds; every picture is also a file in DIR/pictures."""
    environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    sections = [_section("Parts", _table([{"part": k, "result": v} for k, v in state.items()], ("part", "result")))]
    sections += _models(directory / "models.json", directory / "pictures")
    sections += _training(directory / "training.json")
    sections += _kernels(directory / "kernels.csv", directory / "pictures")
    for file in sorted(directory.glob("profile/*/operations.json")):
        sections.append(_profile(file))
    sections += _tuning(directory / "tune.json")
    facts = _table([{"what": k, "value": v} for k, v in environment.items()], ("what", "value"))
    title = f"xlmr on {environment['gpu'] or environment['cpu']}, {environment['date']}"
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{facts}{''.join(sections)}</html>"
    )
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _models(file: Path, pictures: Path) -> list[str]:
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    figures = "".join(map(_picture, plots.throughput(found["rows"], pictures)))
    sections = [_section("Models", figures + _table(found["rows"], harness.MODEL_COLUMNS))]
    if found.get("not_run"):
        reasons = _table(found["not_run"], ("case", "provider", "reason"))
        title = f"{len(found['not_run'])} that were not run, and why"
        sections.append(f"<details><summary>{title}</summary>{reasons}</details>")
    return sections


def _training(file: Path) -> list[str]:
    if not file.exists():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [_section("Training", _table(rows))]


def _kernels(file: Path, pictures: Path) -> list[str]:
    if not file.exists():
        return []
    rows = list(compare.read(file).values())  # a part that ran out of time has begun anew in the next round
    drawn = plots.sweeps(rows, pictures)
    roofs = roofline.roofs(rows)
    ours = "xlmr triton" if any(row["kernel_provider"] == "xlmr triton" for row in rows) else "xlmr eager"
    for mode in harness.MODES:
        points = roofline.points(rows, ours, mode)
        if points and roofs:
            drawn.append(
                plots.roofline(points, roofs, pictures / f"roofline-{mode}.svg", roofline.title(rows, ours, mode))
            )
    numbers = [{**row, **{name: float(row[name]) for name in KERNEL_NUMBERS}} for row in rows]
    figures = "".join(map(_picture, drawn))
    return [_section("Kernels", figures + _table(numbers, harness.KERNEL_COLUMNS))]


def _profile(file: Path) -> str:
    found = json.loads(file.read_text(encoding="utf-8"))
    body = ""
    for kind, name in (("rows", "operations.svg"), ("kernels", "kernels.svg")):
        picture = file.parent / name
        body += (_picture(picture) if picture.exists() else "") + (_table(found[kind]) if found[kind] else "")
    return _section(f"Profile: {found['title']}", body)


def _tuning(file: Path) -> list[str]:
    if not file.exists():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [_section("Tuning", _table(rows, TUNING_COLUMNS))]


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{body}"


def _picture(path: Path) -> str:
    """The SVG itself, so that the page is whole."""
    text = path.read_text(encoding="utf-8")
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _table(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> str:
    """Of these columns, or of all that the rows have."""
    columns = tuple(columns) or tuple(dict.fromkeys(itertools.chain.from_iterable(rows)))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(harness.text(row.get(column, '')))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
