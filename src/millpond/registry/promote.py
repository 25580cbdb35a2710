"""Whether a candidate replaces the champion: a pure function of facts, whose answer says why.

Rule: no worse than the champion on the fixed test split, shown by a paired non-inferiority test, and better on the
held-out corrections. Without a champion there is nothing to be worse than, and the candidate is promoted.
"""

from __future__ import annotations

import math

from millpond.schema import Message, PairedCount

MARGIN = 0.005
"""Loss of accuracy on the test split that would still count as none: half a percentage point."""
ALPHA = 0.05
"""Chance that a candidate which loses `MARGIN` or more is taken for one that does not."""
MOST_EXACT = 20_000
"""Discordant rows up to which McNemar's test is summed exactly (50 ms)."""


class PromotionFacts(Message, frozen=True, kw_only=True):
    """What the decision rests on; candidate and champion were measured on the same rows."""

    candidate: str
    """Version, such as `v4`."""
    champion: str | None
    test: PairedCount
    heldout: PairedCount
    margin: float = MARGIN
    alpha: float = ALPHA


class Promotion(Message, frozen=True, kw_only=True):
    """A decision and why, in plain sentences; p-values are None where there was nothing to compare."""

    promoted: bool
    reasons: list[str]
    facts: PromotionFacts
    p_value: float | None = None
    """Non-inferiority on the test split; below `alpha` the candidate is no worse."""
    p_test_worse: float | None = None
    """Exact McNemar on the test split, for the reader: how likely this many losses are if both are equally good."""
    p_heldout_better: float | None = None
    """Exact McNemar on the held-out corrections, for the reader: how likely this many gains are by chance."""


def decide(facts: PromotionFacts) -> Promotion:
    """Return whether the candidate is promoted, and why."""
    if facts.champion is None:
        return Promotion(promoted=True, reasons=[_alone(facts)], facts=facts)
    if contradiction := _contradiction(facts):
        return Promotion(promoted=False, reasons=[contradiction], facts=facts)
    test, heldout = facts.test, facts.heldout
    p_value = p_noninferior(test, facts.margin)
    no_worse = p_value < facts.alpha
    better = heldout.only_candidate_right > heldout.only_champion_right
    return Promotion(
        promoted=no_worse and better,
        reasons=[_test_reason(facts, p_value, no_worse), _heldout_reason(facts, better)],
        facts=facts,
        p_value=p_value,
        p_test_worse=p_mcnemar(test.only_champion_right, test.only_candidate_right),
        p_heldout_better=p_mcnemar(heldout.only_candidate_right, heldout.only_champion_right),
    )


def p_mcnemar(wins: int, losses: int) -> float:
    """Return the chance of `wins` or more out of `wins + losses` discordant rows if both models are equally good.

    Exact one-sided McNemar test: P(X >= wins), X ~ Binomial(wins + losses, 1/2), summed in whole numbers; beyond
    `MOST_EXACT` discordant rows the normal approximation with continuity correction, which then agrees to 1e-3.
    Source: McNemar, Psychometrika 12 (1947) 153-157; exact: Fagerland et al., BMC Med Res Methodol 13 (2013) 91.
    """
    discordant = wins + losses
    if discordant > MOST_EXACT:
        return 0.5 * math.erfc((wins - losses - 1) / math.sqrt(2 * discordant))
    term = tail = math.comb(discordant, wins)
    for k in range(wins, discordant):
        term = term * (discordant - k) // (k + 1)
        tail += term
    return tail / (1 << discordant)


def p_noninferior(count: PairedCount, margin: float) -> float:
    """Return the p-value of "the candidate loses `margin` or more of the champion's accuracy".

    Score test for a difference of paired proportions. With n rows, of which the candidate alone gets c right and the
    champion alone b: Z = (c - b + n m) / sqrt(n (2 q - m (1 + m))), p = 1 - Phi(Z). There q is the most likely share
    of rows that the champion alone gets right if the loss were exactly m: the larger root of
    2 n q^2 - (b + c + (2 n + b - c) m) q + b m (1 + m) = 0.
    Source: Tango, Statistics in Medicine 17 (1998) 891-908, with his Delta = -m.
    """
    n, gained, lost = count.rows, count.only_candidate_right, count.only_champion_right
    if n == 0:
        return 1.0
    delta = -margin
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * q + delta * (1 - delta))
    if variance <= 0:
        return 1.0
    return 0.5 * math.erfc((gained - lost - n * delta) / math.sqrt(2 * variance))


def _alone(facts: PromotionFacts) -> str:
    right, rows = facts.test.both_right + facts.test.only_candidate_right, facts.test.rows
    return f"There is no champion yet, so {facts.candidate} becomes it; it gets {right} of {rows} test rows right."


def _contradiction(facts: PromotionFacts) -> str:
    for what, count in (("test split", facts.test), ("held-out corrections", facts.heldout)):
        parts = (count.both_right, count.only_champion_right, count.only_candidate_right)
        if min(parts) < 0 or sum(parts) > count.rows:
            return f"The counts of the {what} contradict each other ({count}), so nothing is shown."
    if not (0 < facts.margin < 1 and 0 < facts.alpha < 1):
        return f"A margin of {facts.margin} and an alpha of {facts.alpha} make no test; both lie between 0 and 1."
    return ""


def _test_reason(facts: PromotionFacts, p_value: float, no_worse: bool) -> str:
    test = facts.test
    counts = (
        f"On {test.rows} test rows {facts.candidate} is right on {test.only_candidate_right} that {facts.champion} "
        f"gets wrong and wrong on {test.only_champion_right} that it gets right "
        f"({test.candidate_accuracy:.2%} against {test.champion_accuracy:.2%})"
    )
    if no_worse:
        return f"{counts}: a loss of {facts.margin:.2%} or more is ruled out (p = {p_value:.2g} < {facts.alpha:g})."
    refusal = (
        f"{counts}: a loss of {facts.margin:.2%} or more is not ruled out (p = {p_value:.2g}, not < {facts.alpha:g})."
    )
    agreed = PairedCount(rows=test.rows, both_right=test.rows, only_champion_right=0, only_candidate_right=0)
    if p_noninferior(agreed, facts.margin) >= facts.alpha:
        return f"{refusal} The split is so small that even two equal models could not pass; measure on more rows."
    return refusal


def _heldout_reason(facts: PromotionFacts, better: bool) -> str:
    heldout = facts.heldout
    if not heldout.rows:
        return "There are no held-out corrections on which it could be better."
    verdict = "better" if better else "not better"
    return (
        f"On {heldout.rows} held-out corrections it is {verdict}: right on {heldout.only_candidate_right} that "
        f"{facts.champion} gets wrong, wrong on {heldout.only_champion_right} that it gets right."
    )
