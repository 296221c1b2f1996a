"""The demo, its images, its training and its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from fif_ops import backends, data, demo, report, training  # noqa: E402
from fif_ops.__main__ import main  # noqa: E402
from fif_ops.prepared import PreparedCall  # noqa: E402

TINY = ["--size", "16", "--width", "0.25", "--epochs", "1", "--batch-size", "16", "--rounds", "1", "--threads", "1"]
COLOURS = {"blue": (10, 20, 200), "green": (30, 160, 40), "red": (220, 0, 5)}


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def paint(folder: Path, count: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> None:
    """Fills ``folder`` with one class folder for each colour, holding ``count`` flat PNG images."""
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = Image.new("RGB", size, colour)
            image = image.quantize() if mode == "P" else image.convert(mode)
            image.save(folder / name / f"{index:03}.png")


def run_demo(*arguments: str) -> tuple[int, str]:
    text = StringIO()
    with redirect_stdout(text):
        status = main(["demo", *TINY, *arguments])
    return status, text.getvalue()


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("demo") / "deep" / "er"
    status, text = run_demo("--limit", "15", "--out", str(out))
    return status, text, json.loads((out / "demo.json").read_text()), out


def test_demo_agrees_and_prints_one_table(digits_run: tuple[int, str, dict[str, Any], Path]) -> None:
    status, text, _, out = digits_run
    assert status == 0
    assert "The networks agree" in text
    for words in ("reference", "fused", "test accuracy", "training step", "inference, batch 1,", "saved for backward"):
        assert words in text
    assert "Fused units: 29" in text
    assert max(map(len, text.splitlines())) <= 80 or str(out) in max(text.splitlines(), key=len)


def test_demo_writes_figures_and_plot(digits_run: tuple[int, str, dict[str, Any], Path]) -> None:
    _, _, record, out = digits_run
    assert record["data"] | {"mean": 0, "std": 0} == {
        "name": "digits",
        "classes": [str(digit) for digit in range(10)],
        "train_images": 120,
        "test_images": 30,
        "mean": 0,
        "std": 0,
        "unreadable": [],
    }
    assert record["settings"]["limit"] == 15
    assert record["machine"]["threads"] == 1
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    result = record["result"]
    assert result["agrees"] and result["disagreements"] == []
    assert [len(result["step_loss"][name]) for name in demo.NAMES] == [7, 7]
    assert result["step_loss"]["fused"][0] == pytest.approx(result["step_loss"]["reference"][0], rel=1e-5)
    assert sum(result["paths"].values()) == 29
    for pair in (result["step_ms"], result["latency_ms"]["1"], result["latency_ms"]["64"], result["saved_bytes"]):
        assert pair["reference"] > 0 and pair["fused"] > 0
    with Image.open(out / "demo.png") as plot:
        plot.load()
        assert plot.format == "PNG" and plot.width > 1000 and plot.height > 700


def test_demo_on_class_folders_skips_what_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint(tmp_path / "in", 8)
    (tmp_path / "in" / "red" / "003.png").write_bytes(b"not an image at all")
    whole = (tmp_path / "in" / "blue" / "004.png").read_bytes()
    (tmp_path / "in" / "blue" / "004.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "red" / "notes.txt").write_text("no image, and not meant to be one")
    status, text = run_demo("--data", str(tmp_path / "in"), "--out", str(tmp_path / "out"))
    assert status == 0
    assert "18 training and 4 test images, 3 classes" in text
    warnings = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(warnings) == 1
    assert "skipped 2 unreadable images" in warnings[0]
    assert "red/003.png" in warnings[0] and "blue/004.png" in warnings[0]
    unreadable = json.loads((tmp_path / "out" / "demo.json").read_text())["data"]["unreadable"]
    assert [name.split()[0] for name in unreadable] == ["blue/004.png", "red/003.png"]


def test_demo_says_so_when_the_networks_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PreparedCall.__call__  # what a fused network is without gradients
    monkeypatch.setattr(PreparedCall, "__call__", lambda self, x: 1.1 * right(self, x))
    status, text = run_demo("--limit", "5", "--out", str(tmp_path))
    assert status == 1
    assert "The networks disagree: with equal weights the logits differ" in " ".join(text.split())
    assert not json.loads((tmp_path / "demo.json").read_text())["result"]["agrees"]


@pytest.mark.parametrize("options", [["--channels-last"], ["--dtype", "bfloat16"]])
def test_demo_in_other_numerics(options: list[str], tmp_path: Path) -> None:
    status, _ = run_demo("--limit", "5", "--out", str(tmp_path), *options)
    assert status == 0


def test_what_cannot_run_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, text = run_demo("--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert status == 2 and "HWNet" not in text
    assert capsys.readouterr().err.startswith(f"demo: data folder {str(tmp_path / 'nowhere')!r} does not exist")
    (tmp_path / "taken").write_text("a file where the output folder should be")
    assert run_demo("--out", str(tmp_path / "taken"))[0] == 2
    assert str(tmp_path / "taken") in capsys.readouterr().err
    monkeypatch.setattr(backends, "_ASKED", "abacus")
    assert run_demo("--out", str(tmp_path / "out"))[0] == 2
    assert "FIF_OPS_BACKEND is 'abacus'" in capsys.readouterr().err


def test_training_repeats_under_its_seed_and_starts_both_alike() -> None:
    settings = demo.Settings(size=16, width=0.25, epochs=2, batch_size=8, seed=3)
    splits = data.digits(16, limit=4)
    statistics = data.channel_statistics(splits.train.pixels)
    torch.set_num_threads(1)

    def losses(seed: int) -> list[list[float]]:
        batches = data.training_batches(splits, statistics, 8, seed)
        tests = data.evaluation_batches(splits.test, statistics, 8)
        runs = {name: demo.start_run(replace(settings, seed=seed), 10, 8, name == "fused") for name in demo.NAMES}
        training.train(runs, batches, tests, 2, lambda done, total: None)
        return [runs[name].step_loss for name in demo.NAMES]

    first, again, other = losses(3), losses(3), losses(4)
    assert first == again
    assert first != other
    assert first[0][0] == pytest.approx(first[1][0], rel=1e-5)


def test_digits_are_split_evenly_and_always_alike() -> None:
    splits = data.digits()
    assert splits.train.pixels.shape == (1438, 3, 32, 32) and splits.train.pixels.dtype == torch.uint8
    assert splits.test.pixels.shape == (359, 3, 32, 32)
    assert not splits.flip
    counts = torch.bincount(splits.test.labels, minlength=10)
    assert counts.min() >= 34 and counts.max() <= 38
    assert torch.equal(data.digits().test.pixels, splits.test.pixels)
    assert splits.train.pixels.max() == 255 and splits.train.pixels.min() == 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
@pytest.mark.parametrize("size", [(16, 16), (40, 23)])
def test_class_folders_with_train_and_test(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    paint(tmp_path / "train", 3, size, mode)
    paint(tmp_path / "test", 2, size, mode)
    (tmp_path / "train" / ".hidden").mkdir()
    seen: list[tuple[int, int]] = []
    splits = data.class_folders(tmp_path, 16, progress=lambda done, total: seen.append((done, total)))
    assert splits.classes == ("blue", "green", "red") and splits.flip and splits.unreadable == ()
    assert seen[-1] == (15, 15)
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert splits.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for images in (splits.train, splits.test):
        assert images.pixels.shape == (len(images.labels), 3, 16, 16)
        for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True):
            colour = list(COLOURS.values())[label]
            if mode == "L":
                colour = (Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0)),) * 3
            assert pixels.flatten(1).unique(dim=1).flatten().tolist() == list(colour)


def test_limit_and_stratified_split_of_class_folders(tmp_path: Path) -> None:
    paint(tmp_path, 10)
    splits = data.class_folders(tmp_path, 16, limit=5)
    assert torch.bincount(splits.train.labels).tolist() == [4, 4, 4]
    assert torch.bincount(splits.test.labels).tolist() == [1, 1, 1]


def test_jpeg_images_turned_by_exif_stand_upright(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            image = Image.new("RGB", (64, 64))
            image.paste((255, 255, 255), (0, 0, 64, 32))  # the upper half is white as stored
            exif = Image.Exif()
            exif[0x0112] = 3  # upside down
            image.save(tmp_path / name / f"{index}.jpg", exif=exif)
    pixels = data.class_folders(tmp_path, 16).train.pixels
    assert pixels[0, :, 12:].min() > 240 and pixels[0, :, :4].max() < 15


def test_unusable_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="holds no class folders"):
        data.class_folders(tmp_path)
    (tmp_path / "one").mkdir()
    with pytest.raises(data.DataError, match="one class folder, 'one'"):
        data.class_folders(tmp_path)
    (tmp_path / "two").mkdir()
    with pytest.raises(data.DataError, match="one' holds no image files"):
        data.class_folders(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(data.DataError, match=r"too few readable images .*: one, two"):
        data.class_folders(tmp_path)


def test_test_classes_must_be_known_from_training(tmp_path: Path) -> None:
    paint(tmp_path / "train", 1)
    paint(tmp_path / "test", 1)
    (tmp_path / "test" / "purple").mkdir()
    with pytest.raises(data.DataError, match="purple"):
        data.class_folders(tmp_path)


def test_statistics_are_those_of_the_pixels() -> None:
    pixels = torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact = pixels.double().div(255).transpose(0, 1).flatten(1)
    statistics = data.channel_statistics(pixels)
    torch.testing.assert_close(statistics.mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.std.double(), exact.std(1, correction=0), rtol=1e-6, atol=0)
    assert data.channel_statistics(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).std.min() > 0


def test_crop_pads_with_the_mean_colour_after_normalising() -> None:
    pixels = torch.full((64, 3, 16, 16), 250, dtype=torch.uint8)
    statistics = data.Statistics(torch.full((3,), 0.5), torch.full((3,), 0.25))
    generator = torch.Generator().manual_seed(0)
    images = data.Images(pixels, torch.zeros(64, dtype=torch.int64))
    batch, _ = data.ImageBatches(images, statistics, augment=True, generator=generator).__getitems__(range(64))
    inside = (250 / 255 - 0.5) / 0.25
    values = batch.unique()
    assert len(values) == 2 and values[0] == 0
    assert values[1].item() == pytest.approx(inside, rel=1e-5)
    widest = (batch == 0).all(2).sum(2)  # columns of padding in each image and channel
    assert widest.max() == data.CROP_PADDING and widest.min() == 0


def test_crop_takes_a_window_of_each_image() -> None:
    batch = torch.arange(20 * 3 * 6 * 5, dtype=torch.float32).view(20, 3, 6, 5) + 1
    padded = nn.functional.pad(batch, (2, 2, 2, 2))
    for image, source in zip(data.random_crop(batch, 2, torch.Generator().manual_seed(1)), padded, strict=True):
        windows = [source[:, top : top + 6, left : left + 5] for top in range(5) for left in range(5)]
        assert any(torch.equal(image, window) for window in windows)


def test_flip_mirrors_about_half_of_the_images() -> None:
    batch = torch.arange(200 * 6, dtype=torch.float32).view(200, 1, 2, 3)
    flipped = data.random_flip(batch, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(after, before.flip(2)) for after, before in zip(flipped, batch, strict=True)]
    assert 70 < sum(mirrored) < 130
    assert all(m or torch.equal(after, before) for m, after, before in zip(mirrored, flipped, batch, strict=True))


def test_actions_take_turns() -> None:
    calls: list[str] = []
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    medians = training.interleaved_milliseconds(actions, rounds=3, warmup=1)
    assert "".join(calls) == "abbaabba"
    assert set(medians) == {"a", "b"} and min(medians.values()) >= 0


def test_saved_bytes_counts_each_storage_once_and_no_parameters() -> None:
    images, labels = torch.randn(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    run = training.Run.start(model, 1, 0.1, training.Numerics())
    saved = training.saved_bytes(run, images, labels)
    # The image, and the activation once, although both relu and the linear layer keep it; the loss keeps a little.
    assert 0 <= saved - 4 * (images.numel() + 8 * 256) < 1000


def sound_result() -> report.Result:
    times = report.Pair(2.0, 1.0)
    return report.Result(
        step_loss=report.Pair([1.0], [1.0]),
        test_accuracy=report.Pair([0.95], [0.94]),
        test_images=10_000,
        agreement=training.Agreement(1e-5, 10.0, 10_000, 1e-5, 1e-5),
        reduced_precision=False,
        paths={"cpu": 29},
        batch_size=64,
        step_ms=times,
        latency_ms={1: times},
        saved_bytes=report.Pair(300, 100),
    )


def test_verdict_rests_on_logits_gradients_and_accuracy() -> None:
    sound = sound_result()
    assert sound.disagreements == []
    nan = float("nan")
    for agreement, word in (
        (training.Agreement(0.01, 10.0, 9_990, 1e-5, 1e-5), "logits"),
        (training.Agreement(nan, nan, 0, 1e-5, 1e-5), "logits"),
        (training.Agreement(1e-5, 10.0, 10_000, 1e-5, 0.1), "gradients"),
        (training.Agreement(1e-5, 10.0, 10_000, 1e-5, nan), "gradients"),
    ):
        (problem,) = replace(sound, agreement=agreement).disagreements
        assert word in problem
    assert replace(sound, agreement=training.Agreement(1e-5, 10.0, 10_000, 0.1, 0.2)).disagreements == []
    (problem,) = replace(sound, test_accuracy=report.Pair([0.95], [0.92])).disagreements
    assert problem == "accuracies are 3.0 points apart (limit 2.0)"
    assert replace(sound, test_accuracy=report.Pair([0.95], [0.92]), test_images=100).disagreements == []


def test_recent_mean() -> None:
    assert report.recent_mean([4.0, 2.0, 6.0, 1.0], 2) == pytest.approx([4.0, 3.0, 4.0, 3.5])
