"""Exact match and F1 of answers, as SQuAD defines them.

P. Rajpurkar, J. Zhang, K. Lopyrev and P. Liang, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP
2016, section 6.1; for questions without an answer, P. Rajpurkar, R. Jia and P. Liang, "Know What You Don't Know", ACL
2018, section 5. Case, punctuation, the articles a, an and the, and repeated spaces do not count.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def words_that_count(text: str) -> list[str]:
    """Return the words of an answer that are compared."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(predicted: str, right: Sequence[str]) -> float:
    """Return 1 if an answer equals one of the right ones, else 0. No right answer is the same as an empty one."""
    return float(words_that_count(predicted) in map(words_that_count, right or ("",)))


def f1(predicted: str, right: Sequence[str]) -> float:
    """Return the F1 of the words of an answer, for the right answer that is most like it."""
    return max(_f1(words_that_count(predicted), words_that_count(text)) for text in right or ("",))


def _f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:
        return float(predicted == right)
    n_common = (Counter(predicted) & Counter(right)).total()
    return 2 * n_common / (len(predicted) + len(right))
