"""Compare two methods by their paired differences, one for each seed or draw: means, intervals and p-values."""

import statistics

from scipy.stats import t, ttest_1samp


def interval(values: list[float]) -> float:
    """Return half of the width of the 95 % interval of the mean, by Student's t."""
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def describe(differences: list[float]) -> str:
    """Return the mean of differences and its 95 % interval; only the mean if there is one difference."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f} (n = 1)"
    half = interval(differences)
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def p_of(differences: list[float]) -> float:
    """Return the two-sided p-value of a paired t-test; 1 for one difference, and if all differences are 0."""
    return float(ttest_1samp(differences, 0).pvalue) if len(differences) > 1 and any(differences) else 1.0


def holm(p_values: list[float]) -> list[float]:
    """Return p-values that are corrected for their number (Holm, 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
