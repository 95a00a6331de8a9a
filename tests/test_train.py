"""`resdense train`: what it learns and writes, that it goes on where it was killed, and what it refuses."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_nets
from test_cli import damage, tree, write_images

from resdense_ext import models
from resdense_ext.cli import main
from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.files import keep_aside
from resdense_ext.cli.trainer import batches, checkpoint, examples, folders, metrics, objective
from resdense_ext.cli.trainer.loop import Trainer

Image = pytest.importorskip("PIL.Image", reason="of the extra `demo`, which is not installed")
np = pytest.importorskip("numpy", reason="of the extra `demo`, which is not installed")
pytest.importorskip("sklearn", reason="of the extra `demo`, which is not installed")
pytest.importorskip("matplotlib", reason="of the extra `demo`, which is not installed")

CPU = torch.device("cpu")
RESULTS = {"checkpoint.pt", "checkpoint.previous.pt", "curves.png", "metrics.jsonl", "model.pt"}
# Five steps an epoch.
DIGITS = ["--model", "tiny_densenet", "--epochs", "2", "--batch-size", "64", "--checkpoint-every", "3"]
SHAPES = ["--data", "shapes", "--model", "tiny_segmenter", "--lr", "0.1"]


@pytest.fixture(autouse=True)
def tiny_nets(monkeypatch):
    train_nets.install(monkeypatch.setattr, monkeypatch.setitem)


def train(out, *arguments, status=0):
    assert main(["train", "--device", "cpu", "--out", str(out), *map(str, arguments)]) == status
    return out


def weights(out):
    return torch.load(out / "model.pt", weights_only=True)


def rows(out, kind):
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def without_time(out):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(out, "train") + rows(out, "test")]


def assert_bitwise(out, whole):
    one, other = weights(out), weights(whole)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert without_time(out) == without_time(whole)


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Runs a command that must be refused before a step is taken or a file changes; what it says."""

    def run(*arguments, out=None):
        monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("training began"))
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        try:
            status = main(["train", "--device", "cpu", "--out", str(out or tmp_path / "refused"), *map(str, arguments)])
        except SystemExit as exit:  # argparse's own way to refuse
            status = exit.code
        said = capsys.readouterr()
        assert status == 2 and said.out == "" and "Traceback" not in said.err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return said.err

    return run


def trained(out, interrupted_after=None):
    """A training on the digits; if so, interrupted after that many steps."""
    torch.set_num_threads(2)
    step = Trainer._step

    def interrupted(self, *batch):
        if self.step == interrupted_after:
            raise KeyboardInterrupt
        return step(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        train_nets.install(patch.setattr, patch.setitem)
        patch.setattr(Trainer, "_step", interrupted)
        return train(out, *DIGITS, status=0 if interrupted_after is None else 130)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing interrupts."""
    return trained(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def seven_steps(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("seven") / "run", 7)


@pytest.fixture
def part(seven_steps, tmp_path):
    """A training that was interrupted after seven steps; its checkpoints are of steps 6 and 5."""
    return Path(shutil.copytree(seven_steps, tmp_path / "run"))


def python(code, *arguments, **environment):
    """Starts Python with what a test replaces, on two threads as the tests."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    code = f"import sys, train_nets; train_nets.install()\n{code}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_results(whole, capsys):
    assert tree(whole) == RESULTS
    (run,) = rows(whole, "run")
    assert run["settings"]["model"] == "tiny_densenet" and run["classes"] == list("0123456789")
    steps = rows(whole, "train")
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert [row["epoch"] for row in rows(whole, "test")] == [1, 2]
    assert [row["learning_rate"] for row in steps] == [objective.learning_rate(i, 10, 0, 0.1) for i in range(10)]
    assert all(0 < row["loss"] < 10 and 0 <= row["accuracy"] <= 1 for row in steps)
    models.create("tiny_densenet", num_classes=10, in_channels=1, small_inputs=True).load_state_dict(weights(whole))
    with Image.open(whole / "curves.png") as picture:
        picture.load()
        assert picture.width > 2 * picture.height > 800


def test_a_killed_training_goes_on_to_the_same_bits(whole, tmp_path, capsys):
    code = """
import os, signal
from resdense_ext.cli import main
from resdense_ext.cli.trainer.loop import Trainer
step = Trainer._step
def killed(self, *batch):
    if self.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *batch)
Trainer._step = killed
main(sys.argv[1:])
"""
    process = python(code, "train", "--device", "cpu", "--out", tmp_path, *DIGITS)
    assert process.wait(timeout=120) == -signal.SIGKILL, process.stderr.read()
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 9))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    train(tmp_path, *DIGITS, "--resume")
    assert "going on from step 6 of 10" in capsys.readouterr().out
    assert_bitwise(tmp_path, whole)


def test_an_interrupted_training_says_how_to_go_on(whole, tmp_path, capsys):
    out = trained(tmp_path, 4)
    assert f"interrupted, --resume goes on from step 3 of 10 in {out}" in capsys.readouterr().err
    train(out, *DIGITS, "--resume")
    assert_bitwise(out, whole)
    train(out, *DIGITS, "--resume")  # a finished one has nothing left to do
    assert_bitwise(out, whole)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "one byte short", "one bit"])
def test_a_damaged_checkpoint_is_named_with_the_way_on(how, part, refused):
    path, previous = part / "checkpoint.pt", part / "checkpoint.previous.pt"
    content = path.read_bytes()
    if how == "one byte short":
        path.write_bytes(content[:-1])
    elif how == "one bit":
        weight = checkpoint.load(part, "last")["model"]["classifier.weight"].numpy().tobytes()
        place = content.index(weight) + len(weight) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    else:
        damage(path, how)
    message = refused(*DIGITS, "--resume", out=part)
    assert f"--resume: {path} is damaged" in message
    assert f"{previous} is whole: --resume previous goes on from its step 5" in message


def test_a_training_goes_on_from_the_previous_checkpoint(whole, part, capsys):
    damage(part / "checkpoint.pt", "truncated")
    train(part, *DIGITS, "--resume", "previous")
    assert "going on from step 5 of 10" in capsys.readouterr().out
    assert_bitwise(part, whole)


def test_without_any_checkpoint_there_is_no_restart(whole, tmp_path, refused):
    out = tmp_path / "run"
    assert "there is no " + str(out / "checkpoint.pt") in refused(*DIGITS, "--resume", out=out)
    out.mkdir()
    for name in checkpoint.FILES.values():
        (out / name).write_bytes((whole / name).read_bytes()[:5000])
    message = refused(*DIGITS, "--resume", out=out)
    assert "is damaged" in message and "there is no other one to go on from" in message
    assert "--out: expected a folder without a training" in refused(*DIGITS, out=out)
    torch.save({"model": {}}, out / "checkpoint.pt")
    assert "is not a checkpoint of this command" in refused(*DIGITS, "--resume", out=out)


def test_another_setting_is_refused(whole, refused):
    message = refused(*DIGITS, "--resume", "--lr", "0.5", "--seed", "3", out=whole)
    assert "--resume: expected the settings of the checkpoint: --lr 0.1 (got 0.5), --seed 0 (got 3)" in message
    message = refused(*DIGITS, "--resume", "--data", "shapes", "--model", "tiny_segmenter", "--amp", "bf16", out=whole)
    assert "--data with the same examples (got others)" in message and "no --amp (got bf16)" in message
    path = whole / "checkpoint.pt"
    content = path.read_bytes()
    try:
        state = checkpoint.load(whole, "last")
        checkpoint.write(path, {**state, "settings": {**state["settings"], "processes": 2}})
        assert "the settings of the checkpoint: as many processes, 2 (got 1)" in refused(*DIGITS, "--resume", out=whole)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("which", checkpoint.FILES)
def test_lost_metrics_are_not_passed_over(which, part, refused):
    damage(part / "metrics.jsonl", "truncated")
    message = refused(*DIGITS, "--resume", which, out=part)
    assert f"bytes in {part / 'metrics.jsonl'}, as when the checkpoint was written" in message


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    code = """
import os, signal
import torch
from resdense_ext.cli import main
save, states = torch.save, []
def killed(state, file):
    save(state, file)
    states.append(state)
    if len(states) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
torch.save = killed
main(sys.argv[1:])
"""
    process = python(code, "train", "--device", "cpu", "--out", tmp_path, *DIGITS)
    assert process.wait(timeout=120) == -signal.SIGTERM, process.stderr.read()
    assert len(tree(tmp_path) - RESULTS) == 1
    assert tree(train(tmp_path, *DIGITS, "--resume")) == RESULTS


def test_a_failing_write_leaves_both_checkpoints(tmp_path, full_disk):
    for step in (1, 2):
        checkpoint.save(tmp_path, {"step": step, "model": torch.zeros(9999)})
    with full_disk(5000), pytest.raises(OSError, match="File too large"):
        checkpoint.save(tmp_path, {"step": 3, "model": torch.zeros(9999)})
    assert tree(tmp_path) == set(checkpoint.FILES.values())
    assert [checkpoint.load(tmp_path, which)["step"] for which in ("last", "previous")] == [2, 1]


def test_a_failing_write_in_training_is_said_so(tmp_path, capsys, monkeypatch):
    save, states = torch.save, []

    def fails_late(state, file):
        states.append(state)
        if len(states) > 2:
            file.write(b"half")
            raise OSError("no space left")
        save(state, file)

    monkeypatch.setattr(torch, "save", fails_late)
    train(tmp_path, *DIGITS, status=2)
    assert f"--out: the results could not be written to {tmp_path} (no space left)" in capsys.readouterr().err
    assert tree(tmp_path) == {"metrics.jsonl", *checkpoint.FILES.values()}
    assert checkpoint.load(tmp_path, "last")["step"] == 3


def test_a_file_kept_aside_survives_twice(tmp_path):
    path, aside = tmp_path / "one", tmp_path / "other"
    path.write_text("content")
    keep_aside(path, aside)
    keep_aside(path, aside)
    path.unlink()
    assert aside.read_text() == "content" and tree(tmp_path) == {"other"}


@pytest.mark.parametrize("data", ["shapes", "shapes3d"])
def test_segmentation_learns(data, tmp_path, capsys):
    out = train(tmp_path, "--data", data, "--model", "tiny_segmenter", "--epochs", 4, "--batch-size", 4, "--lr", 0.4)
    first, *_, last = rows(out, "test")
    assert last["dice"] > max(0.3, first["dice"] + 0.1) and last["accuracy"] > 0.85
    assert f"Dice {last['dice']:.3f}" in capsys.readouterr().out


def test_two_processes_are_one_on_the_joined_batch(tmp_path):
    code = """
from pathlib import Path
import torch.distributed as dist
from resdense_ext.cli import main

def destroy(destroy=dist.destroy_process_group):
    alive = gloo_threads()
    destroy()
    # The gradients' group keeps its own; any others could abort the process while it ends.
    assert gloo_threads() == alive // 2, (alive, gloo_threads())

def gloo_threads():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")].count("pt_gloo_runloop")

dist.destroy_process_group = destroy
sys.exit(main(sys.argv[1:]))
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*SHAPES, "--epochs", 1, "--batch-size", 16]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        python(code, "train", "--device", "cpu", "--out", tmp_path / "two", *arguments, RANK=rank, **common) for rank in "01"
    ]
    one = train(tmp_path / "one", *arguments)
    for process in processes:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    two = tmp_path / "two"
    assert tree(two) == RESULTS
    for name, value in weights(one).items():
        assert torch.allclose(weights(two)[name], value, rtol=1e-4, atol=1e-5), name
    for a, b in zip(rows(one, "test"), rows(two, "test")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["dice"] == pytest.approx(b["dice"], rel=1e-2)
    assert len(checkpoint.load(two, "last")["random"]) == 2


def test_views_are_a_function_of_seed_and_epoch():
    data = examples.digits()
    whole = list(batches.TrainingViews(data, 100, seed=0, epoch=3))
    assert whole == list(batches.TrainingViews(data, 100, seed=0, epoch=3))
    assert whole[5:] == list(batches.TrainingViews(data, 100, 0, 3, start=5))
    halves = [list(batches.TrainingViews(data, 100, 0, 3, 0, (process, 2))) for process in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves)] == [sorted(batch) for batch in whole]
    for other in (batches.TrainingViews(data, 100, 0, 4), batches.TrainingViews(data, 100, 1, 3)):
        assert list(other) != whole
    views = [view for batch in whole for view in batch]
    assert len({view.index for view in views}) == len(views) == 1400
    assert {corner for view in views for corner in view.corner} == set(range(5))


def test_an_image_and_its_mask_are_cropped_and_mirrored_alike():
    grid = torch.arange(64.0).view(1, 8, 8)
    source = examples.Tensors(grid[None], grid.long())
    views = [[batches.View(0, (1, 3), ()), batches.View(0, (0, 2), (-1,)), batches.View(0, (2, 0), (-2, -1))]]
    ((images, masks),) = batches.load(source, 4, views, 0, CPU)
    assert torch.equal(images[:, 0], masks.float())
    assert torch.equal(images[0, 0], grid[0, 1:5, 3:7])
    assert torch.equal(images[1, 0], grid[0, :4, 2:6].flip(1))
    assert torch.equal(images[2, 0], grid[0, 2:6, :4].flip(0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_damaged_later_is_named(workers, tmp_path):
    data = folders.folder(write_images(tmp_path), 16, False)
    views = batches.test_views(data, 8)
    damage(data.test.files[0][0], "truncated")
    with pytest.raises(CommandError, match=f"^--data: expected a readable image, got {data.test.files[0][0]}"):
        list(batches.load(data.test, 16, views, workers, CPU))


def test_damaged_images_are_named_and_counted(tmp_path, refused):
    folder = write_images(tmp_path / "images", count=8)
    damage(folder / "cat" / "0.png", "truncated")
    damage(folder / "dog" / "3.png", "empty")
    arguments = ["--data", folder, "--model", "tiny_densenet", "--size", 16, "--epochs", 1, "--batch-size", 6]
    message = refused(*arguments)
    assert "2 of 16 examples cannot be read" in message
    assert str(folder / "cat" / "0.png") in message and str(folder / "dog" / "3.png") in message


def test_damaged_images_are_left_out_on_request(tmp_path, capsys):
    folder = write_images(tmp_path / "images", count=8)
    damage(folder / "cat" / "0.png", "truncated")
    arguments = ["--data", folder, "--model", "tiny_densenet", "--size", 16, "--epochs", 1, "--batch-size", 5, "--workers", 0]
    out = train(tmp_path / "out", *arguments, "--skip-damaged")
    said = capsys.readouterr()
    assert "left out: 1 of 16 examples" in said.err and str(folder / "cat" / "0.png") in said.err
    assert "12 training and 3 test examples, 16x16, 2 classes" in said.out
    assert rows(out, "test")


def write_masked(folder, count=6, size=(20, 12)):
    (folder / "images").mkdir(parents=True), (folder / "masks").mkdir()
    for number in range(count):
        pixels = np.zeros((size[1], size[0]), np.uint8)
        pixels[:, number : number + 9] = 255
        Image.fromarray(pixels).save(folder / "masks" / f"{number}.png")
        Image.fromarray(pixels // 2 + 40).convert("RGB").save(folder / "images" / f"{number}.jpg")
    return folder


def test_a_folder_of_masks(tmp_path):
    data = folders.folder(write_masked(tmp_path), 28, False)
    assert data.masks and data.spatial_dims == 2 and data.classes == ["0", "255"] and data.channels == 3
    assert (len(data.train), len(data.test), data.size, data.margin) == (5, 1, 28, 2)
    image, mask = data.train.read(0)
    assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and mask.unique().tolist() == [0, 1]
    bright = image.float().mean(0) > 100
    assert (bright == mask.bool()).float().mean() > 0.9
    images = torch.stack([data.train.read(i)[0] for i in range(5)])
    normalised = data.normalised(images)
    assert normalised.mean().abs() < 1e-4 and abs(normalised.std() - 1) < 1e-2


def test_a_folder_is_the_same_wherever_it_lies(tmp_path, monkeypatch):
    for name, write in {"labels": write_images, "masks": write_masked, "volumes": write_volumes}.items():
        folder = write(tmp_path / name)
        here = folders.folder(folder, 14, False).identity
        monkeypatch.chdir(tmp_path)
        assert folders.folder(Path(name), 14, False).identity == here
        assert folders.folder(folder.rename(tmp_path / f"moved {name}"), 14, False).identity == here


def test_any_name_will_do(tmp_path, capsys):
    """Neither a formula to matplotlib nor UTF-8."""
    folder = write_masked(tmp_path / os.fsdecode(b"5$ \\a{ $ \xff"))
    for kind in ("images", "masks"):
        for path in (folder / kind).iterdir():
            path.rename(path.with_name(os.fsdecode(b"\xe9") + path.name))
    arguments = ["--data", folder, "--model", "tiny_segmenter", "--size", 16, "--epochs", 1, "--batch-size", 2, "--workers", 0]
    assert tree(train(tmp_path / "out", *arguments)) == RESULTS
    assert "tiny_segmenter on 5$ \\a{ $ ?: 5 training" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["no mask", "no image", "two images", "size", "colour", "damaged", "one value"])
def test_unfit_masks_are_named(how, tmp_path, refused):
    folder = write_masked(tmp_path / "data")
    mask = folder / "masks" / "2.png"
    if how == "no mask":
        mask.unlink()
    elif how == "no image":
        (folder / "images" / "2.jpg").unlink()
    elif how == "two images":
        Image.new("RGB", (20, 12)).save(folder / "images" / "2.png")
    elif how == "size":
        Image.new("L", (20, 13)).save(mask)
    elif how == "colour":
        Image.new("RGB", (20, 12)).save(mask)
    elif how == "damaged":
        damage(mask, "truncated")
    else:
        for path in folder.glob("masks/*"):
            Image.new("L", (20, 12), 7).save(path)
    message = refused("--data", folder, "--model", "tiny_segmenter", "--size", 16)
    expected = {
        "no mask": "got 1 without a partner: 2$",
        "no image": "got 1 without a partner: 2$",
        "two images": f"one file of a name, got {folder / 'images' / '2.jpg'} and {folder / 'images' / '2.png'}",
        "size": rf"its image's size \(20, 12\), got \(20, 13\) in {mask}",
        "colour": f"a mask of one channel of 8 bits, got {mask} of mode RGB",
        "damaged": f"1 of 6 examples cannot be read:\n--data: expected a readable mask, got {mask}",
        "one value": r"at least two values, one a class, got \[7\] alone",
    }
    assert re.search(expected[how], message, re.MULTILINE)


def write_volumes(folder, count=5):
    (folder / "images").mkdir(parents=True), (folder / "masks").mkdir()
    for number in range(count):
        mask = np.zeros((9, 12, 10), np.uint8)
        mask[2:6, number : number + 5] = 3
        np.save(folder / "masks" / f"{number}.npy", mask)
        np.save(folder / "images" / f"{number}.npy", mask.astype(np.float32) * 100)
    return folder


def test_a_folder_of_volumes(tmp_path):
    data = folders.folder(write_volumes(tmp_path), 14, False)
    assert data.masks and data.spatial_dims == 3 and data.classes == ["0", "3"] and data.channels == 1
    image, mask = data.train.read(0)
    assert image.shape == (1, 16, 16, 16) and mask.shape == (16, 16, 16) and set(mask.unique().tolist()) == {0, 1}
    assert ((image[0] > 150) == mask.bool()).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.uint32, np.uint64])
def test_volumes_with_masks_of_any_whole_numbers(dtype, tmp_path):
    masks = write_volumes(tmp_path) / "masks"
    for path in masks.iterdir():
        np.save(path, np.load(path).astype(dtype))
        path.rename(path.with_suffix(".NPY"))
    data = folders.folder(tmp_path, 14, False)
    assert data.classes == (["0", "1"] if dtype is bool else ["0", "3"])
    assert set(data.train.read(0)[1].unique().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((9, 12), np.uint8), "expected a mask of whole numbers .* shape"),
        (np.zeros((0, 12, 10), np.uint8), "expected a mask of whole numbers .* shape"),
        (np.zeros((9, 12, 10), np.complex64), "expected a mask of whole numbers .* torch.complex64"),
        (np.full((9, 12, 10), 256, np.uint16), "expected a mask of whole numbers from 0 to 255"),
        (np.zeros((9, 12, 10)), "expected a mask of whole numbers .* torch.float64"),
        (np.full((9, 12, 10), 256, np.int32), "expected a mask of whole numbers from 0 to 255"),
        (np.array([{}]), "expected a readable volume"),
        (None, "expected a readable volume"),
    ],
)
def test_unfit_volumes_are_named(array, message, tmp_path):
    path = write_volumes(tmp_path) / "masks" / "1.npy"
    damage(path, "truncated") if array is None else np.save(path, array)
    with pytest.raises(CommandError, match=f"1 of 5 examples cannot be read:\n--data: {message}") as error:
        folders.folder(tmp_path, 14, False)
    assert str(path) in str(error.value)


def test_volumes_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    """Examples are read by threads, and CPython's parser, which reads numpy's header, is not safe in them."""
    load, inside, most = np.load, [], []

    def slow(*args, **options):
        inside.append(args)
        most.append(len(inside))
        time.sleep(0.005)
        array = load(*args, **options)
        inside.pop()
        return array

    write_volumes(tmp_path)
    monkeypatch.setattr(np, "load", slow)
    monkeypatch.setattr(folders.os, "cpu_count", lambda: 8)
    folders.folder(tmp_path, 14, False)
    assert len(most) >= 10 and max(most) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "densenet_bc4"], "--model: .*densenet_bc40"),
        (["--model", "tiny_segmenter"], r"--model: expected one for labels, .* shape \(1, 10\), got 'tiny_segmenter'"),
        ([*SHAPES, "--model", "tiny_densenet"], r"--model: expected one for masks, .*\(1, 3, 32, 32\), got 'tiny_densenet'"),
        (["--model", "picky"], r"--model: expected one that takes inputs of 16x16 .*'picky' \(at least 99 pixels, please\)"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--batch-size", "321"], r"--batch-size: .* training examples \(320\), got 321"),
        ([*SHAPES, "--model", "fc_densenet56", "--batch-size", "1"], "--batch-size: expected at least 2 .*'fc_densenet56', got 1 "),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--lr", "-1"], "--lr: expected a positive number, got -1.0"),
        (["--lr", "nan"], "--lr: expected a positive number, got nan"),
        (["--label-smoothing", "1.5"], "--label-smoothing: expected at most 1, got 1.5"),
        (["--warmup", "20"], "--warmup: expected less than the 20 epochs"),
        (["--checkpoint-every", "0"], "--checkpoint-every: expected at least 1, got 0"),
        (["--size", "32"], "--size: expected none with --data digits"),
        (["--amp", "fp16"], "--amp: expected bf16 on cpu"),
        (["--amp", "fp8"], "--amp: invalid choice: 'fp8'"),
        (["--device", "abacus"], "--device: expected .*, got 'abacus'"),
        (["--policy", "min", "--memory-budget", "1GB"], "--memory-budget: expected no --policy beside it, got min"),
        (["--memory-budget", "much"], "--memory-budget: expected a string such as .*, got 'much'"),
        (["--memory-budget", "10"], "--memory-budget: expected at least .* bytes"),
        (["--data", "nowhere"], "--data: expected a folder .*no such folder"),
    ],
)
def test_bad_arguments(arguments, message, refused):
    assert re.search(message, refused("--model", "tiny_densenet", *arguments))


@pytest.mark.parametrize("options", [["--policy", "min"], ["--policy", "none"], ["--policy", "auto"], ["--memory-budget", "0.9"]])
def test_policies_train_alike(options, whole, tmp_path):
    out = train(tmp_path, *DIGITS, *options, "--epochs", 1)
    # The third step's learning rate depends on their number.
    for one, other in zip(rows(out, "train")[:2], rows(whole, "train")):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_mixed_precision(whole, tmp_path):
    first, other = (rows(out, "train")[0]["loss"] for out in (train(tmp_path, *DIGITS, "--amp", "bf16"), whole))
    assert first != other and first == pytest.approx(other, rel=0.02)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, capsys):
    train(tmp_path, *SHAPES, "--lr", "1e30", status=2)
    assert re.search("the training loss is nan at step .*: try a smaller --lr than 1e\\+30", capsys.readouterr().err)


def test_a_test_loss_that_is_not_finite_ends_the_training(tmp_path, capsys, monkeypatch):
    def diverged(self):
        return {"loss": float("nan"), "accuracy": 0.5}

    monkeypatch.setattr(Trainer, "test", diverged)
    train(tmp_path, *DIGITS, status=2)
    assert "the test loss is nan at step 5: try a smaller --lr than 0.1" in capsys.readouterr().err
    assert not rows(tmp_path, "test") and checkpoint.load(tmp_path, "last")["step"] == 3


def test_learning_rate_rises_and_falls():
    rates = [objective.learning_rate(step, 100, 10, 0.3) for step in range(100)]
    assert rates[:10] == pytest.approx([0.03 * i for i in range(1, 11)])
    assert rates[10] == 0.3 and rates[55] == pytest.approx(0.15) and 0 < rates[99] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_norms_and_biases_do_not_decay():
    model = train_nets.tiny_densenet(num_classes=3)
    decayed, others = objective.sgd(model, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0 and others["nesterov"] and decayed["nesterov"]
    undecayed = {id(p) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    assert {id(p) for p in others["params"]} == undecayed | {id(model.classifier.bias)}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_scores_by_hand():
    targets = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 1, 1]]])
    predicted = torch.tensor([[[0, 1, 0, 1]], [[0, 0, 1, 1]]])
    logits = torch.nn.functional.one_hot(predicted, 4).movedim(-1, 1).float()
    scores = metrics.Scores(CPU, classes=4)
    scores.add(torch.tensor(2.0), logits[:1], targets[:1])
    scores.add(torch.tensor(1.0), logits[1:], targets[1:])
    # Class 1: 3 hits, 4 predicted, 4 true; class 2: none of one; class 3 does not occur.
    assert scores.values(torch.clone) == {"loss": 1.5, "accuracy": 6 / 8, "dice": (6 / 8 + 0) / 2}


def test_soft_dice_by_hand():
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 2.0]])[None]
    p, t = logits.softmax(1)[0, 1], torch.tensor([0.0, 1.0, 1.0])
    expected = (2 * (p[1] + p[2]) + 1) / (p.sum() + t.sum() + 1)
    assert objective.soft_dice(logits, t.long()[None]) == pytest.approx(expected.item())
    loss = objective.loss(logits, t.long()[None], 0.0)
    assert loss == pytest.approx((torch.nn.functional.cross_entropy(logits, t.long()[None]) + 1 - expected).item())
