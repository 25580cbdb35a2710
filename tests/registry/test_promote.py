import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.registry import PromotionFacts, decide
from millpond.registry.promote import p_mcnemar, p_noninferior
from millpond.schema import PairedCount

counts = st.integers(0, 3000)


@st.composite
def paired(draw, max_rows=30_000):
    rows = draw(st.integers(0, max_rows))
    lost = draw(st.integers(0, min(rows, 2000)))
    gained = draw(st.integers(0, min(rows - lost, 2000)))
    return PairedCount(
        rows=rows,
        both_right=draw(st.integers(0, rows - lost - gained)),
        only_champion_right=lost,
        only_candidate_right=gained,
    )


def _facts(test, heldout, champion="v1", **rest):
    return PromotionFacts(candidate="v2", champion=champion, test=test, heldout=heldout, **rest)


def _count(rows, lost, gained):
    return PairedCount(
        rows=rows, both_right=rows - lost - gained, only_champion_right=lost, only_candidate_right=gained
    )


# --- the exact McNemar test --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [(0, 0, 1.0), (5, 0, 1 / 32), (1, 1, 0.75), (9, 2, 67 / 2048), (0, 7, 1.0)],
)
def test_mcnemar_gives_the_binomial_tail(wins, losses, expected):
    assert p_mcnemar(wins, losses) == pytest.approx(expected, rel=1e-12)


@given(counts, counts)
def test_mcnemar_is_symmetric(wins, losses):
    """P(X >= wins) + P(X >= losses) is everything, and X = wins a second time, whoever is called the winner."""
    twice = math.comb(wins + losses, wins) / (1 << (wins + losses))
    assert p_mcnemar(wins, losses) + p_mcnemar(losses, wins) == pytest.approx(1 + twice, rel=1e-12)


@given(counts, counts)
def test_mcnemar_falls_with_wins_and_rises_with_losses(wins, losses):
    p = p_mcnemar(wins, losses)
    assert 0 <= p <= 1
    assert p_mcnemar(wins + 1, losses) <= p
    assert p_mcnemar(wins, losses + 1) >= p


def test_mcnemar_stays_stable_for_large_counts():
    assert p_mcnemar(5000, 5000) == pytest.approx(0.5 + 0.5 / math.sqrt(math.pi * 5000), rel=1e-5)
    assert p_mcnemar(6000, 0) == 0.0
    assert p_mcnemar(1000, 0) == 2.0**-1000
    assert p_mcnemar(10_100, 9_901) == pytest.approx(p_mcnemar(10_100, 9_900), rel=2e-2)  # approximate, then exact
    assert p_mcnemar(10**12, 10**12) == pytest.approx(0.5, abs=1e-6)


# --- the non-inferiority test ------------------------------------------------------------------------------------


def test_noninferiority_of_a_case_worked_by_hand():
    """88 q^2 - 9.9 q + 0.11 = 0 gives q = 0.1, so Z = (-1 + 4.4) / sqrt(44 (0.2 - 0.11)) = 1.7086."""
    expected = 0.5 * math.erfc(3.4 / math.sqrt(3.96) / math.sqrt(2))
    assert p_noninferior(_count(44, lost=1, gained=0), 0.1) == pytest.approx(expected, rel=1e-9)


@given(paired(), st.sampled_from([0.001, 0.005, 0.01, 0.1]))
def test_noninferiority_variance_is_that_of_the_most_likely_split(count, margin):
    """Find the share q by bisection of the likelihood's slope instead of by the closed form."""
    n, gained, lost = count.rows, count.only_candidate_right, count.only_champion_right
    if n == 0:
        assert p_noninferior(count, margin) == 1.0
        return
    low, high = margin, (1 + margin) / 2
    for _ in range(200):
        q = (low + high) / 2
        slope = gained * q * (1 - 2 * q + margin) + lost * (q - margin) * (1 - 2 * q + margin)
        slope -= 2 * (n - gained - lost) * q * (q - margin)
        low, high = (q, high) if slope > 0 else (low, q)
    z = (gained - lost + n * margin) / math.sqrt(n * (2 * q - margin - margin**2))
    assert p_noninferior(count, margin) == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), abs=1e-6)


@given(paired(), st.sampled_from([0.001, 0.005, 0.05]))
def test_noninferiority_rises_with_losses(count, margin):
    if count.both_right == 0:
        return
    worse = PairedCount(
        rows=count.rows,
        both_right=count.both_right - 1,
        only_champion_right=count.only_champion_right + 1,
        only_candidate_right=count.only_candidate_right,
    )
    assert p_noninferior(worse, margin) >= p_noninferior(count, margin) - 1e-12


@given(paired())
def test_wider_margin_is_easier_to_keep(count):
    assert p_noninferior(count, 0.01) <= p_noninferior(count, 0.005) + 1e-12


# --- the decision ------------------------------------------------------------------------------------------------


def test_first_candidate_is_promoted():
    decision = decide(_facts(_count(100, 0, 60), _count(0, 0, 0), champion=None))
    assert decision.promoted
    assert "no champion yet" in decision.reasons[0]
    assert decision.p_value is None


def test_better_candidate_is_promoted_and_the_record_says_why():
    decision = decide(_facts(_count(25_000, 500, 750), _count(300, 2, 90)))
    assert decision.promoted
    assert decision.p_value < 0.05
    assert decision.p_heldout_better < 1e-9
    assert "right on 750 that v1 gets wrong and wrong on 500" in decision.reasons[0]
    assert "ruled out" in decision.reasons[0]
    assert "better" in decision.reasons[1]


def test_worse_candidate_is_refused_and_the_record_says_why():
    decision = decide(_facts(_count(25_000, 750, 500), _count(300, 2, 90)))
    assert not decision.promoted
    assert decision.p_test_worse < 1e-6
    assert "not ruled out" in decision.reasons[0]


def test_equal_candidate_is_refused_for_the_corrections_it_did_not_learn():
    decision = decide(_facts(_count(25_000, 100, 100), _count(300, 4, 4)))
    assert not decision.promoted
    assert "ruled out" in decision.reasons[0]
    assert "not better" in decision.reasons[1]


def test_bare_difference_in_favour_does_not_suffice():
    decision = decide(_facts(_count(200, 10, 11), _count(300, 0, 90)))
    assert not decision.promoted
    assert "so small that even two equal models could not pass" in decision.reasons[0]


def test_without_heldout_corrections_nothing_shows_that_it_is_better():
    decision = decide(_facts(_count(25_000, 100, 500), _count(0, 0, 0)))
    assert not decision.promoted
    assert "no held-out corrections" in decision.reasons[1]


@pytest.mark.parametrize(
    "test",
    [
        _count(10, -1, 0),
        _count(-5, 0, 0),
        PairedCount(rows=1, both_right=1, only_champion_right=1, only_candidate_right=1),
    ],
)
def test_counts_that_contradict_each_other_are_refused(test):
    decision = decide(_facts(test, _count(10, 0, 5)))
    assert not decision.promoted
    assert "contradict" in decision.reasons[0]


@pytest.mark.parametrize(
    "rest", [{"margin": 0.0}, {"margin": -0.1}, {"alpha": 0.0}, {"alpha": 1.0}, {"margin": math.nan}]
)
def test_senseless_thresholds_are_refused(rest):
    assert not decide(_facts(_count(25_000, 100, 500), _count(300, 0, 90), **rest)).promoted


@given(paired(), paired(max_rows=500))
def test_one_more_gain_never_turns_promotion_into_refusal(test, heldout):
    def gain(count):
        spare = count.rows - count.both_right - count.only_champion_right - count.only_candidate_right
        return PairedCount(
            rows=count.rows,
            both_right=count.both_right,
            only_champion_right=count.only_champion_right,
            only_candidate_right=count.only_candidate_right + min(1, spare),
        )

    if decide(_facts(test, heldout)).promoted:
        assert decide(_facts(gain(test), heldout)).promoted
        assert decide(_facts(test, gain(heldout))).promoted


@given(paired(), paired(max_rows=500))
def test_two_models_never_replace_each_other_in_turn_for_corrections(test, heldout):
    """What is better on the held-out corrections one way is not better the other way."""

    def swap(count):
        return PairedCount(
            rows=count.rows,
            both_right=count.both_right,
            only_champion_right=count.only_candidate_right,
            only_candidate_right=count.only_champion_right,
        )

    there = decide(_facts(test, heldout)).promoted
    back = decide(_facts(swap(test), swap(heldout))).promoted
    assert not (there and back)


@given(paired(), paired(max_rows=500))
def test_decision_is_repeatable_and_always_says_why(test, heldout):
    facts = _facts(test, heldout)
    assert decide(facts) == decide(facts)
    assert all(decide(facts).reasons)
