import msgspec
import pytest

from millpond.schema import Correction, CorrectionBatch, Identifier, PairedCount


@pytest.mark.parametrize("text", ["", "-a", "a b", "a\n", "a/b", "é", "a" * 129])
def test_identifier_that_could_mislead_is_refused(text):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, Identifier)


@pytest.mark.parametrize("text", ["a", "0", "edge-1.site:7_x", "a" * 128])
def test_identifier_in_common_use_is_accepted(text):
    assert msgspec.convert(text, Identifier) == text


def test_newer_peer_may_send_more_and_older_one_less():
    raw = b'{"edge": "e", "corrections": [{"id": "1", "text": "t", "label": "l", "future": {"x": [1]}}]}'
    batch = msgspec.json.decode(raw, type=CorrectionBatch)
    assert batch.corrections == [Correction(id="1", text="t", label="l")]


def test_accuracies_of_a_paired_count():
    count = PairedCount(rows=10, both_right=6, only_champion_right=1, only_candidate_right=2)
    assert (count.champion_accuracy, count.candidate_accuracy) == (0.7, 0.8)
    none = PairedCount(rows=0, both_right=0, only_champion_right=0, only_candidate_right=0)
    assert (none.champion_accuracy, none.candidate_accuracy) == (0.0, 0.0)
