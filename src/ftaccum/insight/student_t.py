"""Quantiles of Student's t distribution, for the intervals of means and of ratios."""


def t_quantile(probability: float, degrees: float) -> float:
    """Return the quantile of Student's t distribution.

    Args:
        probability: the probability below the quantile.
        degrees: degrees of freedom, not necessarily an integer.
    """
    from scipy.special import stdtrit  # takes 0.2 s to import

    return float(stdtrit(degrees, probability))
