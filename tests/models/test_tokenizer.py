"""Token ids of captions."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_core.models import count_tokens, tokenize
from sdxl_core.models.tokenizer import token_ids

BOS, EOS = 49406, 49407
Length = Literal[75, 150, 225]
LENGTHS: tuple[Length, ...] = (75, 150, 225)
words = st.lists(st.sampled_from(["cat", "1girl", "!", "!!", "astolfo_(fate)", "blue", ","]), max_size=260).map(
    " ".join
)
no_break_words = st.integers(0, 240).map(lambda count: "!" * count + "x")  # ids of 0, which is bigG's padding


def sd_scripts_rows(ids: list[int], max_token_length: int, pad: int) -> list[list[int]]:
    """sd_scripts' rule, read off its description: pad the whole caption, cut it into chunks, mend bigG's ends."""
    ids = ids[:max_token_length]
    whole = [BOS, *ids, EOS]
    whole += [pad] * (max_token_length + 2 - len(whole))
    if max_token_length == 75:
        return [whole]
    rows = []
    for start in range(1, max_token_length, 75):
        row = [BOS, *whole[start : start + 75], whole[-1]]
        if pad != EOS:
            if row[-2] not in (EOS, pad):
                row[-1] = EOS
            if row[1] == pad:
                row[1] = EOS
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("caption", "ids"),
    [
        ("a photo of an astronaut riding a horse", [320, 1125, 539, 550, 18376, 6765, 320, 4558]),
        ("A Photo of a CAT", [320, 1125, 539, 320, 2368]),
        ("a  photo\n of\ta cat ", [320, 1125, 539, 320, 2368]),
        ("", []),
        ("!", [256]),
    ],
)
def test_ids_are_clips(caption: str, ids: list[int]) -> None:
    """Expected values: openai/clip-vit-large-patch14's tokenizer."""
    assert token_ids(caption) == ids
    assert count_tokens(caption) == len(ids)


@pytest.mark.parametrize("max_token_length", LENGTHS)
@settings(deadline=None, max_examples=60)
@given(captions=st.lists(words | no_break_words, max_size=3))
def test_chunks_are_laid_out_as_sd_scripts_does(max_token_length: Length, captions: list[str]) -> None:
    tokens = tokenize(captions, max_token_length=max_token_length)
    for found, pad in ((tokens.clip_l, EOS), (tokens.clip_g, 0)):
        assert found.dtype == torch.int64
        assert found.shape == (len(captions), max_token_length // 75, 77)
        assert found.tolist() == [sd_scripts_rows(token_ids(caption), max_token_length, pad) for caption in captions]


@settings(deadline=None, max_examples=300)
@given(caption=st.text(st.characters(), max_size=200))
def test_any_text_has_tokens(caption: str) -> None:
    """Lone surrogates, control characters, emoji and unassigned code points, too."""
    tokens = tokenize([caption], max_token_length=75)
    for ids in (tokens.clip_l, tokens.clip_g):
        assert ids.shape == (1, 1, 77)
        assert ids[0, 0, 0] == BOS
        assert (ids == EOS).any()
        assert ((ids >= 0) & (ids <= EOS)).all()


@pytest.mark.parametrize("caption", ["\ud800", "\x00", "\U0010ffff", "<|endoftext|>", "é" * 5000, "a" * 100_000])
def test_odd_text_has_tokens(caption: str) -> None:
    ids = tokenize([caption], max_token_length=225).clip_l
    assert ids.shape == (1, 3, 77)
    assert (ids == EOS).sum() >= 1


def test_a_caption_cannot_end_itself_early() -> None:
    """The end mark spelt out in a caption is text, not the mark."""
    assert EOS not in token_ids("cat <|endoftext|> dog")


def test_long_captions_are_cut() -> None:
    short, long = (tokenize(["cat " * count], max_token_length=75) for count in (75, 300))
    assert torch.equal(short.clip_l, long.clip_l)
    assert torch.equal(short.clip_g, long.clip_g)
    assert count_tokens("cat " * 300) == 300


def test_moving_keeps_the_ids() -> None:
    tokens = tokenize(["cat"], max_token_length=75)
    assert tokens.to("meta").clip_g.device.type == "meta"
    assert torch.equal(tokens.to("cpu").clip_g, tokens.clip_g)
