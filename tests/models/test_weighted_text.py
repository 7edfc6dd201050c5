"""Weighted captions: the syntax, the tokens, and what is multiplied."""

import pytest
import torch

from sdxl_core.models import SdxlModels, TokenIds, encode_prompts, tokenize
from sdxl_core.models.weighted_text import weighted_parts

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a, b", [("a, b", 1.0)]),
        ("", []),
        ("a (b:1.2), c", [("a ", 1.0), ("b", 1.2), (", c", 1.0)]),
        ("(a)", [("a", UP)]),
        ("[a]", [("a", DOWN)]),
        ("((a) b)", [("a", UP * UP), (" b", UP)]),
        ("(a [b]:2)", [("a ", 2.0), ("b", DOWN * 2.0)]),
        (r"astolfo \(fate\), x", [("astolfo (fate), x", 1.0)]),
        (r"(astolfo \(fate\):0.5)", [("astolfo (fate)", 0.5)]),
        ("a:1.2, b", [("a:1.2, b", 1.0)]),
        ("(a:b)", [("a:b", UP)]),
        ("(open", [("open", UP)]),
        ("a) ]:) b", [("a) ]:) b", 1.0)]),
        ("(a:0)", [("a", 0.0)]),
        ("back\\slash", [("back\\slash", 1.0)]),
    ],
)
def test_weights_are_read_as_web_uis_write_them(text: str, expected: list[tuple[str, float]]) -> None:
    found = weighted_parts(text)
    assert [part for part, _ in found] == [part for part, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("length", [75, 150])
def test_a_weight_of_one_changes_no_token(length: int) -> None:
    texts = ["boat, sea, blue", "boat, sea, " * 40]
    plain = tokenize(texts, max_token_length=length)  # type: ignore[arg-type]
    weighted = tokenize(texts, max_token_length=length, weighted=True)  # type: ignore[arg-type]
    assert torch.equal(plain.clip_l, weighted.clip_l) and torch.equal(plain.clip_g, weighted.clip_g)
    assert plain.weights is None and weighted.weights is not None
    assert weighted.weights.shape == plain.clip_l.shape and (weighted.weights == 1).all()


def test_weights_stand_at_their_tokens_in_every_chunk() -> None:
    tokens = tokenize(["boat, (sea:1.5), " * 20], max_token_length=150, weighted=True)
    sea = tokenize(["sea"], max_token_length=75).clip_l[0, 0, 1]
    assert tokens.weights is not None
    assert torch.equal(tokens.weights == 1.5, tokens.clip_l == sea) and (tokens.weights[:, 1] == 1.5).any()


@pytest.mark.parametrize("length", [75, 150])
def test_hidden_states_are_multiplied_and_the_pooled_text_is_not(tiny: SdxlModels, length: int) -> None:
    plain = tokenize(["boat, sea, blue"], max_token_length=length)  # type: ignore[arg-type]
    tokens = tokenize(["boat, (sea:1.5), blue"], max_token_length=length, weighted=True)  # type: ignore[arg-type]
    assert torch.equal(tokens.clip_l, plain.clip_l) and tokens.weights is not None
    with torch.no_grad():
        embeds, pooled = encode_prompts(tiny.text_encoder, tiny.text_encoder_2, plain)
        weighted, same = encode_prompts(
            tiny.text_encoder, tiny.text_encoder_2,
            TokenIds(clip_l=tokens.clip_l, clip_g=tokens.clip_g, weights=tokens.weights),
        )  # fmt: skip
    assert torch.equal(pooled, same)
    factors = torch.ones(embeds.shape[1])
    factors[3] = 1.5  # begin, boat, comma, sea
    torch.testing.assert_close(weighted, embeds * factors.view(1, -1, 1))
