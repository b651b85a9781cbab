"""Write the tables in examples/paper/README.md, and the plots, from results/*.csv.

    python examples/paper/report.py            # --check writes nothing, and fails if a table differs from its file
    python examples/paper/report.py --compare few-images KD NKD    # the paired t-test between two rows
    python examples/paper/report.py --pooled USKD                  # the mean gain over six tables

The table of results/NAME.csv is between <!-- table NAME --> and <!-- end -->.
"""

import argparse
import csv
import functools
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from paired import describe, holm, interval, p_of

HERE = Path(__file__).resolve().parent
PAGES = [HERE.parents[1] / "README.md", HERE / "README.md"]
BASELINE, TUNED = "cross-entropy", "KD tuned"  # only some tables have KD tuned
PRACTITIONER = "500 photographs, student\nfrom ImageNet weights"
# The settings of the README's chart, with the rows of KD and of NKD (with tuned weights, if there are any).
GAINS = {
    "teacher on the same images,\nstudent underfits": ("few-epochs", "KD", "NKD"),
    "teacher on the same images,\nstudent fits": ("few-images", "KD", "NKD"),
    "ImageNet teacher,\nstudent underfits": ("lite", "KD tuned", "NKD tuned"),
    "ImageNet teacher,\nstudent fits": ("lite-fits", "KD tuned", "NKD tuned here"),
    "ImageNet teacher,\n50 classes": ("lite-50", "KD tuned here", "NKD tuned here"),
    "no teacher,\n50 classes": ("self-50", "", ""),
    "no teacher, 50 classes,\nstudent fits": ("self-50-fits", "", ""),
}
# Settings in which USKD has the same loss weights
POOLED = ("few-epochs", "few-images", "self-20", "self-50", "self-100", "self-50-fits")
SELF = {classes: f"self-{classes}" for classes in (20, 50, 100)}  # each has 8,000 images in total


def read(name: str) -> dict[str, dict[int, dict[str, str]]]:
    """Return the rows of results/NAME.csv by method and seed."""
    table: dict[str, dict[int, dict[str, str]]] = {}
    with open(HERE / f"results/{name}.csv", newline="") as file:
        for row in csv.DictReader(file):
            table.setdefault(row["method"], {})[int(row["seed"])] = row
    return table


def column(rows: dict[int, dict[str, str]], key: str) -> list[float]:
    return [float(rows[seed][key]) for seed in sorted(rows)]


def spread(values: list[float], digits: int = 2) -> str:
    """Return the mean +- the standard deviation over seeds."""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def baseline_of(method: str, table: dict[str, dict[int, dict[str, str]]]) -> str:
    """Return the name of the cross-entropy row; if the table has several networks, that of the method's network."""
    own = method.partition(" ")[0] + " " + BASELINE
    return own if own in table else BASELINE


def gains(base_name: str, method: str, table: dict[str, dict[int, dict[str, str]]]) -> list[float]:
    """Return the gains in top-1 of a method over another, one for each seed; [] if they cannot be paired.

    They cannot be paired if their seeds differ, if they are the same row, or if the method is the teacher.
    """
    rows, base = table[method], table.get(base_name, {})
    if method in ("teacher", base_name) or rows.keys() != base.keys():
        return []
    return [a - b for a, b in zip(column(rows, "val_top1"), column(base, "val_top1"))]


def markdown(name: str) -> str:
    table = read(name)
    bases = {f"over {BASELINE}": functools.partial(baseline_of, table=table)}
    bases |= {f"over {TUNED}": lambda _: TUNED} if TUNED in table else {}
    head = ["trained with", "seeds", "top-1 %", "top-5 %", "cross-entropy in training, validation"]
    head += [cell for base in bases for cell in (base, "p")]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    found = {(method, base): gains(of(method), method, table) for method in table for base, of in bases.items()}
    # leave out cross-entropy over KD tuned, because the row of KD tuned has this comparison
    found = {key: values for key, values in found.items() if len(values) > 1 and key != (BASELINE, f"over {TUNED}")}
    p_values = dict(zip(found, holm([p_of(values) for values in found.values()])))
    for method, rows in table.items():
        cells = [method, str(len(rows)), spread(column(rows, "val_top1")), spread(column(rows, "val_top5"), 1)]
        cells += [", ".join(f"{statistics.mean(column(rows, key)):.2f}" for key in ("loss_ce", "val_loss"))]
        for key in ((method, base) for base in bases):
            cells += [describe(found[key]), f"{p_values[key]:.2g}"] if key in found else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(name: str) -> None:
    """Plot a dot for each run, and mean and standard deviation; the vertical line is the mean of cross-entropy."""
    table = {method: column(rows, "val_top1") for method, rows in read(name).items() if method != "teacher"}
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.35 * len(table)), layout="constrained")
    for y, (method, values) in enumerate(table.items()):
        axes.plot(values, [y] * len(values), "o", markersize=4, alpha=0.6, color=f"C{int(method != BASELINE)}")
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(statistics.mean(values), y, xerr=deviation, fmt="|", color="black", capsize=4)
    if BASELINE in table:
        axes.axvline(statistics.mean(table[BASELINE]), color="C0", linewidth=0.8)
    axes.set_yticks(range(len(table)), list(table))
    axes.set_ylim(len(table) - 0.5, -0.5)  # the first row on top
    axes.set_xlabel("top-1 of the last epoch (%)")
    axes.grid(axis="x", alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": name}):  # equal data give an equal file
        figure.savefig(HERE / f"results/{name}.svg", metadata={"Date": None})
    plt.close(figure)


def plot_classes() -> None:
    """Plot the gain over cross-entropy by number of classes, without a teacher: means and standard errors."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    tables = {classes: read(name) for classes, name in SELF.items()}
    for i, method in enumerate(("label smoothing", "Tf-KD", "USKD")):
        found = {  # shifted, so that the methods do not overlap
            classes * 1.03 ** (i - 1): gains(BASELINE, method, table)
            for classes, table in tables.items()
            if len(gains(BASELINE, method, table)) > 1
        }
        errors = [statistics.stdev(values) / len(values) ** 0.5 for values in found.values()]
        means = [statistics.mean(values) for values in found.values()]
        axes.errorbar(list(found), means, errors, fmt="o-", capsize=4, label=method)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(list(SELF), [str(classes) for classes in SELF])
    axes.minorticks_off()
    axes.set_xlabel("classes (8,000 images in total)")
    axes.set_ylabel("top-1 over cross-entropy (points)")
    axes.legend()
    with matplotlib.rc_context({"svg.hashsalt": "classes"}):
        figure.savefig(HERE / "results/self-classes.svg", metadata={"Date": None})
    plt.close(figure)


def gains_of_setting(name: str, kd: str, nkd: str) -> dict[str, list[float]]:
    """Return each method's gains over cross-entropy in a table; a method that the table lacks has []."""
    table = read(name)
    rows = {"KD": kd, "NKD": nkd, "USKD": "USKD", "label smoothing": "label smoothing"}
    return {method: gains(BASELINE, row, table) if row in table else [] for method, row in rows.items()}


def plot_gains() -> None:
    """Plot the gain of each method over cross-entropy in each setting: means and their 95 % intervals."""
    from practitioner import gains_of_chosen  # imported here, because it imports torch

    settings = {PRACTITIONER: gains_of_chosen()} | {name: gains_of_setting(*rows) for name, rows in GAINS.items()}
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    methods = {"KD": ("C0", "s"), "NKD": ("C1", "o"), "USKD": ("C2", "D"), "label smoothing": ("C7", "v")}
    for i, (method, (color, marker)) in enumerate(methods.items()):
        axes.plot([], [], marker, color=color, label=method)
        for y, values in enumerate(setting.get(method) for setting in settings.values()):
            if values:
                place = y + 0.18 * (i - 1.5)
                axes.errorbar(statistics.mean(values), place, xerr=interval(values), fmt=marker, color=color, capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(settings)), list(settings))
    axes.set_ylim(len(settings) - 0.5, -0.5)  # the first row on top
    axes.set_xlabel("points of top-1 over cross-entropy, with 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    with matplotlib.rc_context({"svg.hashsalt": "gains"}):
        figure.savefig(HERE / "results/gains.svg", metadata={"Date": None})
    plt.close(figure)


def pooled(method: str) -> str:
    """Return the mean of a method's gains in the tables of POOLED, with the 95 % interval over the tables."""
    tables = {name: read(name) for name in POOLED}
    found = {name: gains(BASELINE, method, table) for name, table in tables.items() if method in table}
    found = {name: values for name, values in found.items() if len(values) > 1}
    if not found:
        known = sorted({name for table in tables.values() for name in table} - {"teacher", BASELINE})
        raise SystemExit(f"report.py: error: no table has a row {method!r}: expected one of {', '.join(known)}")
    return f"{describe(list(map(statistics.mean, found.values())))}, n = {len(found)} tables: {', '.join(found)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is out of date")
    parser.add_argument(
        "--compare", nargs=3, metavar=("TABLE", "METHOD", "OTHER"), help="print the gain of a row over another"
    )
    parser.add_argument("--pooled", metavar="METHOD", help="print the mean gain of a method over six tables")
    args = parser.parse_args()
    if args.pooled:
        print(pooled(args.pooled))
        return 0
    if args.compare:
        name, method, other = args.compare
        names = {file.stem for file in HERE.glob("results/*.csv")}
        if name not in names:
            parser.error(f"no table {name}: expected one of {', '.join(sorted(names))}")
        table = read(name)
        if missing := {method, other} - table.keys():
            parser.error(f"{name} has no {missing.pop()!r}: expected one of {', '.join(table)}")
        differences = gains(other, method, table)
        if len(differences) < 2:
            parser.error(f"{method} and {other}: expected two different rows with at least two seeds, the same in both")
        print(f"{describe(differences)}, p = {p_of(differences):.2g}")
        return 0
    status = 0
    for page in PAGES:
        text = page.read_text()
        new = re.sub(
            r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)",
            lambda m: f"{m[1]}\n{markdown(m[2])}\n\n{m[3]}",
            text,
            flags=re.S,
        )
        if args.check and new != text:
            print(f"{page} is out of date: run python examples/paper/report.py", file=sys.stderr)
            status = 1
        elif not args.check:
            page.write_text(new)
    shown = {name for page in PAGES for name in re.findall(r"results/([\w-]+)\.svg", page.read_text())}
    for name in sorted(shown) if not args.check else ():
        if name == "self-classes":
            plot_classes()
        elif name == "gains":
            plot_gains()
        else:
            plot(name)
    return status


if __name__ == "__main__":
    sys.exit(main())
