"""Pictures of measurements, for reports and studies: SVG or PNG by the file's name."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

matplotlib.rcParams["svg.hashsalt"] = "xlmr"  # the same picture of the same figures, byte for byte
# One colour a provider, the same in every picture (Okabe & Ito, 2008: told apart by every eye).
COLOURS = {
    "xlmr triton": "#D55E00", "xlmr eager": "#E69F00", "xlmr prepacked": "#CC79A7", "torch": "#0072B2",
    "torch.compile": "#56B4E9", "transformers sdpa": "#0072B2", "liger": "#009E73", "cut cross entropy": "#CC79A7",
}  # fmt: skip
OTHERS = ("#999999", "#000000", "#882255", "#009E73", "#CC79A7")


def colour(name: str, names: Sequence[str]) -> str:
    unknown = [other for other in names if other not in COLOURS]
    return COLOURS[name] if name in COLOURS else OTHERS[unknown.index(name) % len(OTHERS)]


def sweeps(rows: Iterable[Mapping[str, Any]], directory: Path) -> list[Path]:
    """A picture an operation: times over what is swept, a panel a mode and dtype, a band from 20 % to 80 %."""
    by_operation: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_operation[row["kernel_name"]].append(row)
    paths = []
    for operation, own in by_operation.items():
        panels: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
        for row in own:
            settings = json.loads(row["extra_benchmark_config_str"])
            title = f"{row['kernel_operation_mode']}, " + ", ".join(
                f"{k} {v}" for k, v in settings.items() if k in SHOWN
            )
            panels[title, row["x_label"]].append(row)
        panels = {title: points for title, points in panels.items() if len({p["x_value"] for p in points}) > 1}
        if panels:
            paths.append(_panels(operation, panels, directory / f"{operation}.svg"))
    return paths


SHOWN = ("dtype", "lengths", "V")  # of a panel's settings


def _panels(name: str, panels: Mapping[tuple[str, ...], list[Mapping[str, Any]]], path: Path) -> Path:
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False)
    for axis, ((title, label), rows) in zip(axes.flat, sorted(panels.items()), strict=False):
        names = list(dict.fromkeys(row["kernel_provider"] for row in rows))
        for provider in names:
            own = sorted((r for r in rows if r["kernel_provider"] == provider), key=lambda r: float(r["x_value"]))
            x = [float(row["x_value"]) for row in own]
            low, middle, high = ([float(row[f"y_value_{q}"]) for row in own] for q in (20, 50, 80))
            axis.plot(x, middle, marker="o", label=provider, color=colour(provider, names))
            axis.fill_between(x, low, high, alpha=0.2, color=colour(provider, names))
        axis.set(xlabel=label, ylabel="ms", title=title)
        plain(axis, "xy", sorted({float(row["x_value"]) for row in rows}))
        axis.legend(fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(name)
    return save(figure, path)


def plain(axis: Any, log: str, x: Sequence[float]) -> None:
    """Logarithmic scales whose numbers are written out; along x those of the points."""
    for name in log:
        getattr(axis, f"set_{name}scale")("log")
    if "x" in log:
        axis.set_xticks(x, [f"{value:,.0f}" for value in x])
        axis.xaxis.set_minor_locator(NullLocator())
    if "y" in log:
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,), numticks=12))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def roofline(
    points: Iterable[Mapping[str, Any]], roofs: Mapping[str, tuple[float, float]], path: Path, title: str
) -> Path:
    """Achieved flop/s over flops a byte. `roofs`: (flop/s, bytes/s) by dtype; points: name, gflops, gbytes, ms."""
    figure, axis = plt.subplots(figsize=(10, 5))
    for (dtype, (peak, bandwidth)), style in zip(roofs.items(), ("-", "--", ":"), strict=False):
        x = sorted([2**-4, peak / bandwidth, 2**13])
        axis.plot(x, [min(peak, bandwidth * v) / 1e9 for v in x], style, color="black", lw=1, label=f"roof, {dtype}")
    shown = list(points)
    names = list(dict.fromkeys(p["name"] for p in shown))
    for i, name in enumerate(names):
        own = [p for p in shown if p["name"] == name]
        x, y = [p["gflops"] / p["gbytes"] for p in own], [p["gflops"] / p["ms"] * 1e3 for p in own]
        axis.plot(x, y, "osD^vP*"[i % 7], ms=6, alpha=0.8, label=name)
    axis.set(xscale="log", yscale="log", xlabel="flops a byte", ylabel="GFLOP/s", title=title)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return save(figure, path)


def bars(values: Mapping[str, float], path: Path, title: str, unit: str) -> Path:
    """Horizontal bars with their values, the longest first."""
    ranked = sorted(values.items(), key=lambda item: item[1])
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.35 * len(ranked)))
    colours = [COLOURS.get(name, OTHERS[0]) for name, _ in ranked]
    drawn = axis.barh([name for name, _ in ranked], [value for _, value in ranked], color=colours)
    axis.bar_label(drawn, fmt=f"%.3g {unit}", padding=3, fontsize=8)
    axis.margins(x=0.18)
    axis.set(title=title, xlabel=unit)
    return save(figure, path)


def throughput(rows: Iterable[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Thousands of real tokens a second of whole models: over the length if fixed, as bars for each mix."""
    fixed: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    mixes: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.get("group") == "fixed":
            fixed[f"{row['size']}, {row['dtype']}"][row["provider"]][row["longest"]] = row["tokens_per_s"] / 1e3
        elif row.get("group") == "mix":
            mixes[f"{row['case']}, {row['dtype']}"][row["provider"]] = row["tokens_per_s"] / 1e3
    unit, paths = "k tokens/s", []
    for name, series in fixed.items():
        if len(set().union(*series.values())) > 1:
            path, title = directory / f"fixed-{_slug(name)}.svg", f"Tokens a second, all texts equally long: {name}"
            paths.append(lines(series, path, title, "tokens in each text", unit, log="xy"))
    for name, values in mixes.items():
        paths.append(bars(values, directory / f"mix-{_slug(name)}.svg", f"Real tokens a second: {name}", unit))
    return paths


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(",", "").replace(" ", "-")


def lines(
    series: Mapping[str, Mapping[float, float]], path: Path, title: str, x: str, y: str, *, log: str = ""
) -> Path:
    """One line a name; `log` names the logarithmic axes."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, points in series.items():
        places = sorted(points)
        axis.plot(places, [points[at] for at in places], marker="o", label=name, color=colour(name, list(series)))
    axis.set(title=title, xlabel=x, ylabel=y)
    plain(axis, log, sorted(set().union(*series.values())))
    axis.set_ylim(bottom=None if "y" in log else 0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    plt.close(figure)
    return path
