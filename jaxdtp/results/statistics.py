"""Numbers over seeds: means, standard deviations, confidence intervals, and whether two rules differ."""

import math
from collections.abc import Sequence

import numpy as np

from jaxdtp.results.reports import Record

CONFIDENCE = 0.95


def over_seeds(records: dict[int, Record]) -> Record:
    """The mean of each number over seeds and, of two seeds or more, its spread.

    Args:
        records: by seed.

    Returns:
        By name the mean over the seeds that have the number, NaN left out; 'std' by name, the standard deviation with
        n - 1; 'ci95' by name, half of the mean's 95 % confidence interval, `confidence_half_width`; 'seeds', the
        records by seed, as text.
    """
    names = dict.fromkeys(name for record in records.values() for name in record)
    values = {name: [record[name] for record in records.values() if name in record] for name in names}
    values = {name: [value for value in of_name if not math.isnan(value)] for name, of_name in values.items()}
    several = {name: of_name for name, of_name in values.items() if len(of_name) > 1}
    return {name: float(np.mean(of_name)) if of_name else math.nan for name, of_name in values.items()} | {
        "std": {name: float(np.std(of_name, ddof=1)) for name, of_name in several.items()},
        "ci95": {name: confidence_half_width(of_name) for name, of_name in several.items()},
        "seeds": {str(seed): record for seed, record in records.items()},
    }


def confidence_half_width(values: Sequence[float]) -> float:
    """t s / sqrt(n), with s the standard deviation of n >= 2 values and t the 0.975 quantile of Student's distribution
    with n - 1 degrees of freedom: mean +- that holds the expected value with a probability of 95 % where values are
    normal."""
    from scipy import stats  # takes time, and adds filters of warnings

    count = len(values)
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p-value of Welch's t-test: how probable means at least that far apart would be if both had the same
    expected value; variances may differ. None where there are fewer than two values of one, or no spread at all."""
    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    from scipy import stats  # as above

    of_samples = [value for sample in (a, b) for value in (np.mean(sample), np.std(sample, ddof=1), len(sample))]
    return float(stats.ttest_ind_from_stats(*of_samples, equal_var=False).pvalue)
