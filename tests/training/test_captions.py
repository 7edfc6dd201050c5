"""What text a sample has in an epoch."""

from dataclasses import replace

import pytest

from sdxl_core.training.captions import CaptionRules, caption_text

PLAIN = CaptionRules(separator=", ", shuffle=False, keep_tokens=0, dropout_rate=0.0, seed=0)


@pytest.mark.parametrize(
    ("sentence", "tags", "expected"),
    [
        ("A boat, at sea.", "boat, sea", "A boat, at sea., boat, sea"),
        ("", "boat,sea , x", "boat,sea , x"),
        ("A boat.", "", "A boat."),
        ("", "", ""),
        ("\nA boat.\nEin Boot.", "boat, sea\nBoot, See", "A boat., boat, sea"),
    ],
)
def test_sentence_and_tags_are_joined_as_written(sentence: str, tags: str, expected: str) -> None:
    assert caption_text(sentence, tags, PLAIN, epoch=0, key="a") == expected


def test_shuffling_keeps_the_sentence_whole_and_the_first_tags_in_front() -> None:
    rules = replace(PLAIN, shuffle=True, keep_tokens=2)
    tags = [f"t{i}" for i in range(12)]
    texts = [caption_text("A, b.", ",".join(tags), rules, epoch=epoch, key="a") for epoch in range(5)]
    for text in texts:
        assert text.startswith("A, b., t0, t1, ")
        assert sorted(text.removeprefix("A, b., ").split(", ")) == sorted(tags)
    assert len(set(texts)) == 5, "another order each epoch"
    assert texts[3] == caption_text("A, b.", ",".join(tags), rules, epoch=3, key="a")
    assert texts[3] != caption_text("A, b.", ",".join(tags), rules, epoch=3, key="b")


def test_dropout_empties_its_share_of_captions_anew_each_epoch() -> None:
    rules = replace(PLAIN, dropout_rate=0.25)
    dropped = [[caption_text("", "x", rules, epoch=e, key=str(i)) == "" for i in range(4000)] for e in (0, 1)]
    assert all(0.22 < sum(row) / len(row) < 0.28 for row in dropped)
    both = sum(a and b for a, b in zip(*dropped, strict=True)) / 4000
    assert 0.04 < both < 0.085, "independent between epochs"
