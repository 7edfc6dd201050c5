"""Generations of training state: whole or not there, and never of another run."""

import logging
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.training.loss_average import LossAverage
from sdxl_core.training.state import Snapshot, load_newest, read_generation, read_manifest, save_snapshot

SETTINGS = {"seed": 1, "learning_rate": 4e-7, "dataset": "abc"}


def save(folder: Path, step: int, **settings: Any) -> Path:
    tensors = {
        "weights": {"unet.w": torch.full((3, 4), float(step), dtype=torch.bfloat16)},
        "optimizer": {"unet.w/state1": torch.arange(5, dtype=torch.uint8), "unet.w/step": torch.tensor(float(step))},
    }
    scalars = {"loss_total": 0.1 + step, "optimizer": {"unet.w": {"step": step}}}
    return save_snapshot(folder, Snapshot(step=step, settings=SETTINGS | settings, scalars=scalars, tensors=tensors))


def test_what_was_saved_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path, 7)
    loaded = load_newest(tmp_path, settings=SETTINGS)
    assert loaded is not None and loaded.step == 7
    assert loaded.scalars == {"loss_total": 7.1, "optimizer": {"unet.w": {"step": 7}}}
    assert torch.equal(loaded.tensors["weights"]["unet.w"], torch.full((3, 4), 7.0, dtype=torch.bfloat16))
    assert loaded.tensors["optimizer"]["unet.w/state1"].dtype == torch.uint8


def test_two_generations_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_damaged_later_generation_does_not_count_as_one_that_is_kept(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (save(tmp_path, 9) / "weights.safetensors").unlink()
    for step in (4, 5):
        save(tmp_path, step)
    whole = ["step-00000004", "step-00000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*whole, "step-00000009"]
    for step in (9, 10):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]


def test_no_state_is_a_fresh_start(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "state", settings=SETTINGS) is None


@pytest.mark.parametrize("victim", ["manifest.json", "weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_newest_state_falls_back_with_a_warning(
    tmp_path: Path, victim: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / victim
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif victim != "manifest.json":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.write_bytes(b"[]" + data[2:])
    with caplog.at_level(logging.WARNING):
        loaded = load_newest(tmp_path, settings=SETTINGS)
    assert loaded is not None and loaded.step == 1
    assert str(path) in caplog.text and "before it" in caplog.text


def test_any_flipped_byte_of_a_manifest_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json: "):
            read_manifest(path.parent)
    at = data.index(b"2.1")  # a number of the loss: still a manifest, but of another run
    path.write_bytes(data[:at] + b"3" + data[at + 1 :])
    loaded = load_newest(tmp_path, settings=SETTINGS)
    assert loaded is not None and loaded.step == 1
    assert "manifest.json: is not what was written (sha256 differs). Falling back to the generation" in caplog.text


def test_states_of_the_first_version_are_read(tmp_path: Path) -> None:
    """Their manifest has no digest, and they know the base model otherwise."""
    path = save(tmp_path, 1, base_model="dated") / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    del manifest["sha256"]
    path.write_bytes(orjson.dumps(manifest))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        read_generation(path.parent)
    path.write_bytes(orjson.dumps(manifest | {"format": 2}))
    asked = SETTINGS | {"base_model": "by content"}
    assert load_newest(tmp_path, settings=asked, formerly={"base_model": "dated"}) is not None
    with pytest.raises(ConfigError, match=r"base_model \('dated' there"):
        load_newest(tmp_path, settings=asked, formerly={"base_model": "another"})


def test_only_damaged_states_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "manifest.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="Delete the folder to start again"):
        load_newest(tmp_path, settings=SETTINGS)


def test_a_run_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"learning_rate \(4e-07 there, 1e-05 now\)"):
        load_newest(tmp_path, settings=SETTINGS | {"learning_rate": 1e-5})


def test_a_write_that_was_cut_leaves_the_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr("sdxl_core.training.state.sha256_file", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_avr_loss_is_the_mean_of_the_last_epoch() -> None:
    losses = [0.5, 0.3, 0.9, 0.1, 0.2, 0.7, 0.4]
    average = LossAverage(3)
    seen = []
    for step, loss in enumerate(losses):
        average.add(step, loss)
        seen.append(average.value)
    assert seen == pytest.approx([sum(losses[max(0, i - 2) : i + 1]) / min(3, i + 1) for i in range(7)])
    resumed = LossAverage(3)
    resumed.load(average.window(), average.total)
    for other in (average, resumed):
        other.add(7, 0.6)
    assert resumed.value == average.value
