"""What text a sample has in an epoch. Where sd-scripts does otherwise on purpose, the test says so."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from sdxl_core.cli import main
from sdxl_core.config import TrainConfig, TrainOptions
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.training.caption_rules import caption_rules, caption_warning, tag_rates
from sdxl_core.training.captions import CaptionRules, caption_text
from sdxl_core.training.show_captions import caption_lines, shown_captions

TAGS = ", ".join(f"t{i}" for i in range(12))


def rules(*, warmup_steps: int = 0, tag_rates: dict[str, float] | None = None, **options: Any) -> CaptionRules:
    return CaptionRules(
        options=TrainOptions(**options), seed=0, warmup_steps=warmup_steps, tag_rates=tag_rates or {}
    )  # fmt: skip


def text_of(tags: str, sentence: str = "", *, epoch: int = 0, key: str = "a", step: int = 0, **options: Any) -> str:
    return caption_text(sentence, tags, rules(**options), epoch=epoch, key=key, step=step)


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
    """sd-scripts takes the first line of the joined text: with a sentence of two lines the tags are lost."""
    assert text_of(tags, sentence) == expected


def test_shuffling_keeps_the_sentence_whole_and_the_first_tags_in_front() -> None:
    """sd-scripts shuffles the sentence's parts among the tags, and keep_tokens counts them."""
    texts = [text_of(TAGS, "A, b.", epoch=epoch, shuffle_caption=True, keep_tokens=2) for epoch in range(5)]
    for text in texts:
        assert text.startswith("A, b., t0, t1, ")
        assert sorted(text.removeprefix("A, b., ").split(", ")) == sorted(TAGS.split(", "))
    assert len(set(texts)) == 5, "another order each epoch"
    again = text_of(TAGS, "A, b.", epoch=3, shuffle_caption=True, keep_tokens=2)
    other = text_of(TAGS, "A, b.", epoch=3, key="b", shuffle_caption=True, keep_tokens=2)
    assert texts[3] == again != other


def test_a_random_line_is_another_each_epoch() -> None:
    lines = {text_of("x", "A boat.\n\nA ship.\nA bark.", epoch=e, caption_line="random") for e in range(30)}
    assert lines == {"A boat., x", "A ship., x", "A bark., x"}, "with its tags, which sd-scripts loses"


def test_wildcards_choose_one_word_and_doubled_braces_are_braces() -> None:
    tags = "{red|blue|green} hair, {{x}}, {one}, {a|b} {a|b}"
    texts = [text_of(tags, epoch=epoch, enable_wildcard=True) for epoch in range(60)]
    hairs = Counter(text.split(", ")[0] for text in texts)
    assert set(hairs) == {"red hair", "blue hair", "green hair"} and min(hairs.values()) > 8
    assert all(text.split(", ")[1:3] == ["{x}", "one"] for text in texts)
    assert {text.split(", ")[3] for text in texts} == {"a a", "a b", "b a", "b b"}, "each is chosen for itself"
    assert text_of(tags) == tags, "off: as written"
    assert text_of("x", "{A|A} boat", enable_wildcard=True) == "A boat, x"


def test_separators_of_ones_own() -> None:
    bound = [text_of("a ;;; b, c, d", epoch=e, shuffle_caption=True, secondary_separator=" ;;; ") for e in range(20)]
    assert all("a, b" in text and sorted(text.split(", ")) == ["a", "b", "c", "d"] for text in bound)
    assert len(set(bound)) > 3
    assert text_of("a;b; c", shuffle_caption=True, keep_tokens=3, caption_separator="; ") == "a; b; c"
    for name in ("secondary_separator", "keep_tokens_separator"):
        with pytest.raises(ValueError, match=f"{name} = ',' cannot be told from caption_separator"):
            TrainOptions(**{name: ","})


def test_the_keep_separator_fixes_what_stands_before_and_behind() -> None:
    tags = "a, b ||| c, d, e ||| y, z"
    options: dict[str, Any] = {"keep_tokens_separator": "|||", "shuffle_caption": True, "keep_tokens": 5}
    texts = {text_of(tags, epoch=e, **options) for e in range(20)}
    assert all(text.startswith("a, b, ") and text.endswith(", y, z") and len(text) == 19 for text in texts)
    assert len(texts) > 3
    assert text_of("a ||| b, c", keep_tokens_separator="|||") == "a, b, c", "sd-scripts leaves the mark in the text"


def test_tags_warm_up_one_after_the_other() -> None:
    lengths = [len(text_of(TAGS, step=s, warmup_steps=10, token_warmup_min=2).split(", ")) for s in range(12)]
    assert lengths == [2 + s for s in range(10)] + [12, 12]
    shuffled = text_of(TAGS, step=3, warmup_steps=10, token_warmup_min=2, shuffle_caption=True)
    assert sorted(shuffled.split(", ")) == sorted(TAGS.split(", ")[:5]), "the first tags, then shuffled"
    assert text_of("a", step=3, warmup_steps=10, token_warmup_min=2) == "a"
    kept = text_of(TAGS, step=0, warmup_steps=10, token_warmup_min=1, keep_tokens=3)
    assert kept == "t0, t1, t2, t3", "fixed tags do not count"


def test_the_length_of_the_warm_up_is_steps_or_a_share(config: Callable[..., TrainConfig]) -> None:
    assert caption_rules(config(token_warmup_step=0.25), total_steps=200).warmup_steps == 50
    assert caption_rules(config(token_warmup_step=30), total_steps=200).warmup_steps == 30


def test_tag_dropout_takes_its_share_of_each_tag_and_spares_the_kept() -> None:
    texts = [text_of(TAGS, key=str(i), caption_tag_dropout_rate=0.3, keep_tokens=2).split(", ") for i in range(1000)]
    counts = Counter(tag for text in texts for tag in text)
    assert counts["t0"] == counts["t1"] == 1000
    assert all(640 < counts[f"t{i}"] < 760 for i in range(2, 12))
    assert text_of(TAGS, caption_tag_dropout_rate=1.0) == ""
    order = [tag for tag in TAGS.split(", ") if tag in texts[0]]
    assert texts[0] == order, "what is left keeps its order"


def test_dropout_by_category_replaces_the_general_rate() -> None:
    rates = {"some_artist_(x)": 1.0, "t1": 0.0}
    text = text_of(r"Some artist \(x\), t1, t2", tag_rates=rates, caption_tag_dropout_rate=0.0)
    assert text == "t1, t2", "tags meet in normalised form"
    assert text_of("t1, t2", tag_rates=rates, caption_tag_dropout_rate=1.0) == "t1"


def test_categories_come_from_the_file_beside_the_metadata(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "tag_categories.json").write_bytes(orjson.dumps({"artist": ["a_b"], "general": ["c"], "meta": []}))
    found = config(metadata=tmp_path / "meta_lat.json", tag_dropout_by_category={"artist": 0.5})
    assert tag_rates(found) == {"a_b": 0.5}
    with pytest.raises(ConfigError, match="has no tags of meta; it knows artist, general"):
        tag_rates(found.model_copy(update={"tag_dropout_by_category": {"meta": 0.5}}))
    with pytest.raises(ConfigError, match=r"there is no .*other.json. merge-tags writes it when it merges a catalog"):
        tag_rates(found.model_copy(update={"tag_categories": tmp_path / "other.json"}))
    (tmp_path / "tag_categories.json").write_bytes(b'["a"]')
    with pytest.raises(DataError, match="not a JSON object of lists of tags"):
        tag_rates(found)
    assert tag_rates(config()) == {}
    with pytest.raises(ValueError, match=r"artist: 2\.0 is no share"):
        TrainOptions(tag_dropout_by_category={"artist": 2.0})


def test_dropout_empties_its_share_of_captions_anew_each_epoch() -> None:
    drops = rules(caption_dropout_rate=0.25, caption_prefix="p")
    dropped = [
        [caption_text("", "x", drops, epoch=e, key=str(i), step=0) == "" for i in range(4000)] for e in (0, 1)
    ]  # fmt: skip
    assert all(0.22 < sum(row) / len(row) < 0.28 for row in dropped), "the prefix goes with it"
    both = sum(a and b for a, b in zip(*dropped, strict=True)) / 4000
    assert 0.04 < both < 0.085, "independent between epochs"


def test_every_nth_epoch_may_be_without_captions() -> None:
    texts = [text_of("x", epoch=epoch, caption_dropout_every_n_epochs=3) for epoch in range(6)]
    assert texts == ["x", "x", "", "x", "x", ""]


def test_prefix_and_suffix_stay_where_they_are() -> None:
    """sd-scripts joins them to the first and last tag, and shuffles them along."""
    for epoch in range(5):
        text = text_of(TAGS, epoch=epoch, caption_prefix="best,", caption_suffix=", end", shuffle_caption=True)
        assert text.startswith("best, t") and text.endswith(" , end")
    assert text_of("", caption_prefix="only") == "only"


def test_no_caption_dropout_is_warned_of(config: Callable[..., TrainConfig]) -> None:
    warning = caption_warning(config())
    assert warning is not None and "never sees an empty caption" in warning
    assert caption_warning(config(caption_dropout_rate=0.1)) is None
    assert caption_warning(config(caption_dropout_every_n_epochs=5)) is None


def test_each_choice_has_random_numbers_of_its_own() -> None:
    """Switching one option on does not change what another chooses."""
    shuffled = text_of(TAGS, shuffle_caption=True)
    assert text_of(TAGS, "{a|a}", shuffle_caption=True, enable_wildcard=True) == f"a, {shuffled}"
    dropped = text_of(TAGS, caption_tag_dropout_rate=0.3).split(", ")
    both = text_of(TAGS, caption_tag_dropout_rate=0.3, shuffle_caption=True).split(", ")
    assert sorted(both) == sorted(dropped)


def test_captions_are_shown_as_they_are_tokenised(config: Callable[..., TrainConfig]) -> None:
    def lines(num: int, **options: Any) -> list[str]:
        run = config(**options)
        return list(caption_lines(shown_captions(run, num), run))

    cut = lines(4, caption_suffix=", very" * 40)
    assert cut[-1] == "4 captions: 4 cut; 75 tokens at most (max_token_length)"
    assert cut[0].startswith("step 1  pic") and "[75 of " in cut[0]
    assert cut[1].startswith("    text: ") and cut[2].startswith("    seen: ") and "boat , sea , t" in cut[2]
    assert cut[3].startswith("    cut:  ") and set(cut[3].split()[1:]) == {",", "very"}
    assert "    weights: 'big' x 1.5" in lines(1, caption_prefix="(big:1.5)", weighted_captions=True)
    assert lines(3, caption_dropout_rate=1.0)[-1].startswith("3 captions: 3 empty;")
    assert lines(25)[-1].startswith("25 captions: 25 whole"), "ten pictures: into the third epoch"


def test_the_commands_print_them(config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    run = config(max_train_steps=3)
    run.out.mkdir()
    file = run.out / "train.toml"
    file.write_text(f"metadata = '{run.metadata}'\nlatents = '{run.latents}'\nout = '{run.out}'\n")
    main(["show-captions", "--config", str(file), "--num", "2"])
    shown = capsys.readouterr().out
    main(["train", "--config", str(file), "--show-captions", "2"])
    assert capsys.readouterr().out == shown and shown.endswith("(max_token_length)\n")
    assert not (run.out / "train.log").exists(), "nothing was trained"
    main(["show-captions", "--config", str(file), "--num", "2", "--json"])
    rows = [orjson.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["cut"] for row in rows] == ["", ""] and rows[0]["text"] in shown
