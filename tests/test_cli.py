"""The command line: what it prints and writes, and what it refuses before any work, leaving nothing behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resdense_ext
from resdense_ext.cli import data, demo, files, main, network, picture, training
from resdense_ext.cli.demo_comparison import Comparison, Result
from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.table import format_table

Image = pytest.importorskip("PIL.Image")


def write_images(folder: Path, classes=("cat", "dog"), count=4, size=(20, 12)) -> Path:
    """Noise of a brightness that tells the class."""
    generator = torch.Generator().manual_seed(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(100 * index, 100 * index + 56, (size[1], size[0], 3), generator=generator)
            Image.frombytes("RGB", size, bytes(pixels.flatten().tolist())).save(folder / name / f"{number}.png")
    return folder


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def shallow_curve(monkeypatch):
    monkeypatch.setattr(network, "CURVE_DEPTHS", (10, 22))


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Runs a command that must be refused before training, without a traceback or a trace on disk."""

    def run(*arguments) -> str:
        monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("training began"))
        monkeypatch.chdir(tmp_path)
        before = tree(tmp_path)
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse's own way to refuse
            status = exit.code
        captured = capsys.readouterr()
        assert status == 2
        assert tree(tmp_path) == before
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return captured.err

    return run


@pytest.mark.parametrize("policy", ["fast", "min"])
def test_demo_on_a_folder(policy, images, tmp_path, capsys, shallow_curve):
    out = tmp_path / "a" / "b"
    if policy == "min":
        out.mkdir(parents=True)
        (out / "demo.json").write_text("of an earlier run")
    arguments = ["demo", "--data", images, "--policy", policy, "--depth", 10, "--epochs", 3, "--out", out]
    assert main([str(argument) for argument in arguments]) == 0

    printed = capsys.readouterr()
    assert printed.err == "", "the progress bar must be silent where stderr is not a terminal"
    assert printed.out.rstrip().endswith(f"Picture: {out / 'demo.png'}")
    table = [re.split(r"\s{2,}", line.strip()) for line in printed.out.splitlines()]
    assert ["stock", f"converted ({policy})", "ratio"] in table
    rows = {row[0]: row[1:] for row in table}
    names = {"test accuracy", "kept for backward", "peak of a step", "seconds a step (median)", "loss difference, 3 steps *"}
    assert all(len(rows[name]) >= 2 for name in names)

    assert tree(out) == {"demo.json", "demo.png"}
    results = json.loads((out / "demo.json").read_text())
    stock, converted = results["comparison"]["stock"], results["comparison"]["converted"]
    assert len(stock["losses"]) == len(converted["losses"]) == len(stock["seconds"]) == 3
    assert stock["losses"][0] == pytest.approx(converted["losses"][0], rel=1e-5)
    assert results["comparison"]["loss_difference"] == max(
        abs(a - b) for a, b in zip(stock["losses"], converted["losses"])
    )
    assert converted["saved_bytes"] < stock["saved_bytes"]
    curves = results["saved_bytes_an_image_by_depth"]
    assert [depth for depth, _ in curves["min"]] == [10, 22]
    for (_, kept_min), (_, kept_fast), (_, kept_stock) in zip(curves["min"], curves["fast"], curves["stock"]):
        assert 0 < kept_min < kept_fast < kept_stock
    with Image.open(out / "demo.png") as picture:
        picture.load()
        assert picture.width > picture.height > 300


def test_demo_on_digits(tmp_path, capsys, shallow_curve, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(training, "BATCH_SIZE", 256)
    assert main(["demo", "--depth", "10", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert "1438 training and 359 test images, 16x16, 10 classes" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "demo.json").read_text())["comparison"]["stock"]["losses"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "41"], "--depth: expected 6n .*, got 41"),
        (["--depth", "4"], "--depth: expected 6n .*, got 4"),
        (["--depth", "-2"], "--depth: expected 6n .*, got -2"),
        (["--depth", "deep"], "--depth: invalid int value: 'deep'"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--policy", "max"], "--policy: invalid choice: 'max'"),
        (["--device", "abacus"], "--device: expected .*, got 'abacus'"),
        (["--device", "meta"], "--device: expected .*, got 'meta'"),
        (["--device", "cuda:99"], "--device: expected .*, got 'cuda:99'"),
    ],
)
def test_bad_settings(arguments, message, refused, images):
    assert re.search(message, refused("demo", "--data", images, *arguments))


def test_no_command(refused):
    assert "COMMAND" in refused()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "corrupted":
        path.write_bytes(content[:40] + bytes(255 - byte for byte in content[40:]))
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_text("this is no image")


@pytest.mark.parametrize("how", ["corrupted", "truncated", "empty", "text"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_damaged_image(how, suffix, images, refused):
    path = images / "dog" / f"damaged{suffix}"
    with Image.open(images / "dog" / "0.png") as image:
        image.save(path)
    damage(path, how)
    message = refused("demo", "--data", images)
    assert f"--data: expected a readable image, got {path}" in message


def test_no_such_folder(tmp_path, refused):
    assert re.search("--data: expected a folder .*nowhere .no such folder", refused("demo", "--data", tmp_path / "nowhere"))


@pytest.mark.parametrize("command", ["demo", "train"])
def test_results_are_no_class(command, images, refused):
    assert "--out: expected a folder outside of --data" in refused(command, "--data", images, "--out", images / "a" / "b")
    assert "--out: expected a folder outside of --data" in refused(command, "--data", ".")


@pytest.mark.parametrize("command", ["demo", "train"])
def test_a_folder_that_cannot_be_looked_into(command, tmp_path, refused):
    # A permission would be none to the super-user.
    folder = tmp_path / ("long" * 99)
    assert re.search(f"--data: expected a folder .*got {folder} .*File name too long", refused(command, "--data", folder))


def test_data_is_a_file(images, refused):
    path = images / "cat" / "0.png"
    assert f"got {path} (not a folder)" in refused("demo", "--data", path)


def test_empty_folder(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "at least two classes, got no subfolder" in refused("demo", "--data", tmp_path / "empty")


def test_single_class(tmp_path, refused):
    folder = write_images(tmp_path / "single", classes=["cat"])
    assert "at least two classes, got only the class 'cat'" in refused("demo", "--data", folder)


@pytest.mark.parametrize("count", [0, 1])
def test_class_with_too_few_images(count, images, tmp_path, refused):
    write_images(images, classes=["eel"], count=count)
    message = refused("demo", "--data", images)
    assert "--data: expected at least 2 images" in message
    assert f"got {count} in {images / 'eel'}" in message


def test_out_is_a_file(images, tmp_path, refused):
    (tmp_path / "taken").write_text("mine")
    assert "--out: expected a folder that can be written" in refused("demo", "--data", images, "--out", tmp_path / "taken")
    assert "--out: expected" in refused("demo", "--data", images, "--out", tmp_path / "taken" / "below" / "deeper")
    assert (tmp_path / "taken").read_text() == "mine"


def test_out_is_read_only(images, tmp_path, refused):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    assert "--out: expected a folder that can be written" in refused("demo", "--data", images, "--out", folder)


def test_out_holds_a_folder_named_like_a_result(images, tmp_path, refused):
    (tmp_path / "out" / "demo.png").mkdir(parents=True)
    assert "demo.png is a folder" in refused("demo", "--data", images, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("missing", "arguments"), [("sklearn", []), ("matplotlib", []), ("PIL", ["--data", "images"])]
)
def test_missing_package(missing, arguments, images, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    message = refused("demo", *arguments)
    assert missing in message and 'pip install "resdense_ext[demo]"' in message


def test_an_interrupted_run_writes_nothing(images, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "step", interrupt)
    out = tmp_path / "out"
    assert main(["demo", "--data", str(images), "--depth", "10", "--out", str(out)]) == 130
    assert not out.exists()
    assert "interrupted" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_said_so(images, tmp_path, capsys, monkeypatch):
    def fail(path, *_):
        path.write_bytes(b"half a picture")
        raise OSError("no space left")

    result = Result(0.5, 2, 1, [0.1], [1.0])
    monkeypatch.setattr(demo, "compare", lambda *_: Comparison("fast", 8, result, result, 1, 0.0, 0.0))
    monkeypatch.setattr(network, "saved_by_depth", lambda *_: {})
    monkeypatch.setattr(picture, "draw", fail)
    out = tmp_path / "out"
    assert main(["demo", "--data", str(images), "--depth", "10", "--epochs", "1", "--out", str(out)]) == 2
    assert "no space left" in capsys.readouterr().err
    assert tree(out) == {"demo.json"}


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert tree(tmp_path) == {"result"} and path.read_text() == "old"


def test_folders_are_read_the_same_way_each_time(tmp_path):
    folder = write_images(tmp_path / "images", classes=["b", "a", ".hidden"], count=10)
    (folder / "a" / "notes.txt").write_text("not an image")
    (folder / "a" / "deeper").mkdir()
    (folder / "a" / "0.png").rename(folder / "a" / "deeper" / "0.PNG")
    one, other = data.image_folder(folder), data.image_folder(folder)
    assert one.classes == ["a", "b"]
    assert one.train_images.shape == (16, 3, 32, 32) and one.test_images.shape == (4, 3, 32, 32)
    assert one.test_labels.bincount().tolist() == [2, 2]
    assert torch.equal(one.train_images, other.train_images) and torch.equal(one.test_images, other.test_images)
    assert one.train_images.mean().abs() < 1e-4 and abs(one.train_images.std() - 1) < 0.02


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_is_read_as_rgb(mode, tmp_path):
    path = tmp_path / "image.tif" if mode == "CMYK" else tmp_path / "image.png"
    grey = Image.new("I;16", (9, 5), 100 * 256) if mode == "I;16" else Image.new("RGB", (9, 5), "#646464").convert(mode)
    grey.save(path)
    assert torch.equal(data.pixels(data.read_image(path, 32)), torch.full((3, 32, 32), 100, dtype=torch.uint8))


def test_batches_are_of_one_size_and_repeatable():
    images = torch.arange(10.0).view(10, 1, 1, 1)
    dataset = data.Dataset("ten", ["a"], images, torch.arange(10), images, torch.arange(10))
    assert training.batch_size(dataset) == 10
    first = [labels.tolist() for _, labels in training.batches(dataset, 2, torch.device("cpu"))]
    assert [sorted(labels) for labels in first] == [list(range(10))] * 2 and first[0] != first[1]
    assert first == [labels.tolist() for _, labels in training.batches(dataset, 2, torch.device("cpu"))]


def test_nudged_parameters_are_one_unit_away():
    layer = torch.nn.Linear(3, 2)
    moved = training.nudged(layer)
    assert torch.equal(torch.nextafter(moved.weight, torch.tensor(-torch.inf)), layer.weight)


def test_table_is_aligned():
    assert format_table([("name", "n"), ("a", "10"), ("bcdef", "7")], "<>") == (
        "name    n\n" "-----  --\n" "a      10\n" "bcdef   7"
    )


def test_depth_counts_convolutions_and_classifier():
    model = network.densenet_bc(22, 1, 10, None)
    counted = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(counted) == 22
    with pytest.raises(CommandError):
        network.layers_a_block(5)


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in (resdense_ext.__version__, torch.__version__, "python", "triton", "build", "cpu", "backend", "why"):
        assert word in printed


def test_info_does_not_import_triton():
    code = "import sys; from resdense_ext.cli import main; main(['info']); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_may_leave():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        result = subprocess.run([sys.executable, "-m", "resdense_ext", "info"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr == ""


def test_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "resdense_ext", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"resdense_ext {resdense_ext.__version__}"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "demo" in printed and "info" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tuning_needs_a_gpu(capsys):
    assert main(["bench", "--tune"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("resdense bench: error: --tune: ") and said.err.count("\n") == 1
