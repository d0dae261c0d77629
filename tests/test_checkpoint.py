"""best.safetensors and fine-tuning from it, and that nothing good is ever lost on the way to the disk."""

import errno
import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers import edit
from timm.models import adapt_input_conv

from dualtoken_vit.checkpoint import (
    checksum,
    license_of,
    load_weights,
    locate,
    own_weights,
    read_checkpoint,
    save_checkpoint,
    store_preprocessing,
)
from dualtoken_vit.errors import InputError
from dualtoken_vit.files import atomic_folder, atomic_write
from dualtoken_vit.predictors import load_model

SMALL = dict(dims=(16, 32, 32), depths=(1, 1, 1), head_hidden_size=32)
NAMES = ("cat", "dog", "ewe", "fox")


def make(num_classes=4, **kwargs):
    torch.manual_seed(0)
    return timm.create_model("dualtoken_vit_tiny", num_classes=num_classes, **SMALL, **kwargs)


def save(path, model, in_chans=3, **model_args):
    statistics = dict(mean=(0.5,) * in_chans, std=(0.25,) * in_chans)
    preprocessing = dict(input_size=(in_chans, 40, 40), interpolation="bicubic", crop_pct=0.9, **statistics)
    save_checkpoint(
        path,
        model,
        task="classification",
        class_names=NAMES,
        preprocessing=preprocessing,
        recipe={"optim": {"lr": 0.1}},
        metrics={"val_top1": 0.75},
        model_args=SMALL | model_args,
    )
    return path


def test_what_was_saved_is_read_again(tmp_path):
    model = make(token_grid=5).to(memory_format=torch.channels_last)
    path = save(tmp_path / "deep" / "best.safetensors", model, token_grid=5)
    loaded, checkpoint = load_model(path)
    assert not loaded.training
    x = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(loaded(x), model.eval()(x))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert checkpoint.task == "classification"
    assert checkpoint.model == "dualtoken_vit_tiny"
    assert checkpoint.model_args["token_grid"] == 5
    assert checkpoint.class_names == NAMES
    assert checkpoint.preprocessing["input_size"] == [3, 40, 40]
    assert checkpoint.preprocessing["crop_pct"] == 0.9
    assert checkpoint.recipe == {"optim": {"lr": 0.1}}
    assert checkpoint.metrics == {"val_top1": 0.75}


def test_timm_reads_the_file(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("dualtoken_vit_tiny", num_classes=10)
    path = save(tmp_path / "best.safetensors", model)
    loaded = timm.create_model("dualtoken_vit_tiny", num_classes=10, checkpoint_path=str(path))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_metadata_is_plain_json(tmp_path):
    path = save(tmp_path / "best.safetensors", make())
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["class_names"]) == list(NAMES)


@pytest.mark.parametrize("read", [read_checkpoint, load_model, lambda path: load_weights(make(), path)])
def test_a_missing_file(tmp_path, read):
    with pytest.raises(InputError, match=r"nothing\.safetensors: no such checkpoint"):
        read(tmp_path / "nothing.safetensors")


def test_a_network_without_weights_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^dualtoken_vit_tiny: no such checkpoint, and no weights of this"):
        locate("dualtoken_vit_tiny")


@pytest.mark.parametrize("read", [read_checkpoint, lambda path: load_weights(make(), path)])
@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file(tmp_path, read, length):
    path = save(tmp_path / "best.safetensors", make())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="cannot be read"):
        read(path)


@pytest.mark.parametrize("read", [read_checkpoint, load_model, lambda path: load_weights(make(), path)])
@pytest.mark.parametrize("where", ["weights", "preprocessing"])
def test_a_flipped_bit(tmp_path, read, where):
    """In the first weight, whose sign changes, or in a digit of the mean: neither is noticed without the checksum."""
    path = save(tmp_path / "best.safetensors", make())
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    begin = json.loads(content[8:header])["head.weight"]["data_offsets"][0]
    place, bit = (header + begin + 3, 128) if where == "weights" else (content.index(b"[0.5") + 3, 1)
    content[place] ^= bit
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"best\.safetensors is damaged: its content does not match its checksum"):
        read(path)
    edit(path, path)  # a file of an early version has none
    read(path)


def test_the_checksum_is_kept_up(tmp_path):
    path = save(tmp_path / "best.safetensors", make())
    store_preprocessing(path, temperature=2.0)
    assert read_checkpoint(path).preprocessing["temperature"] == 2.0
    with safetensors.safe_open(path, framework="pt") as file:
        assert len(file.metadata()["sha256"]) == 64


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux, which lists the mapped files")
def test_a_checkpoint_is_not_mapped_when_it_is_replaced(monkeypatch, tmp_path):
    """Windows replaces no file that is mapped."""
    path = save(tmp_path / "best.safetensors", make())
    mapped, replace = [], os.replace

    def observing(source, target):
        mapped.append(str(target) in Path("/proc/self/maps").read_text())
        replace(source, target)

    monkeypatch.setattr(os, "replace", observing)
    store_preprocessing(path, temperature=2.0)
    assert mapped == [False]


def test_the_same_network_is_the_same_file(tmp_path):
    model = make()
    first, *others = (save(tmp_path / f"{number}.safetensors", model) for number in range(5))
    assert {path.read_bytes() for path in others} == {first.read_bytes()}
    assert int.from_bytes(first.read_bytes()[:8], "little") % 8 == 0  # aligned tensors, as safetensors writes them


def test_files_of_other_kinds(tmp_path):
    model = make()
    bare = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(model.state_dict(), bare)
    with pytest.raises(InputError, match=r"--model\.checkpoint"):
        read_checkpoint(bare)
    pickled = tmp_path / "last.ckpt"
    torch.save({"state_dict": model.state_dict()}, pickled)
    with pytest.raises(InputError, match=r"best\.safetensors"):
        read_checkpoint(pickled)
    with pytest.raises(InputError, match="is a folder"):
        read_checkpoint(tmp_path)
    for content in ([1, 2], {"epoch": 3}):
        torch.save(content, pickled)
        with pytest.raises(InputError, match=r"last\.ckpt"):
            load_weights(model, pickled)


@pytest.mark.parametrize("read", [read_checkpoint, license_of, lambda path: load_weights(make(), path)])
def test_metadata_of_too_many_levels(tmp_path, read):
    path = save(tmp_path / "best.safetensors", make())
    edit(path, path, metadata=lambda found: found | {"recipe": "[" * 200_000})
    with pytest.raises(InputError, match=r"best\.safetensors (was written by another|cannot be read as a checkpoint)"):
        read(path)


def test_weights_that_do_not_fit_the_network_they_name(tmp_path):
    path = save(tmp_path / "best.safetensors", make(token_mlp="mix"))  # does not say so
    with pytest.raises(InputError, match=r"best\.safetensors does not fit timm"):
        load_model(path)


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "evil.pth"
    torch.save({"head.weight": Evil()}, path)
    with pytest.raises(InputError, match=r"evil\.pth"):
        load_weights(make(), path)
    assert not (tmp_path / "ran").exists()


def test_other_classes_leave_the_classifier_new(tmp_path):
    source = make()
    path = save(tmp_path / "best.safetensors", source)
    torch.manual_seed(5)
    target = make(num_classes=7)
    before = target.head.weight.clone()
    report = load_weights(target, path)
    assert set(report.new) == set(report.ignored) == {"head.weight", "head.bias"}
    assert len(report.loaded) == len(source.state_dict()) - 2
    assert report.adapted == ()
    assert torch.equal(target.head.weight, before)
    assert torch.equal(target.stages[2].blocks[0].mlp.fc1.weight, source.stages[2].blocks[0].mlp.fc1.weight)
    total = len(target.state_dict())
    assert f"loaded {total - 2} of {total} tensors" in str(report)
    assert "re-initialised: head.weight, head.bias" in str(report)


def test_another_network_that_shares_most_tensors_is_named(tmp_path):
    mixed = timm.create_model("dualtoken_vit_tiny_mix", num_classes=4, **SMALL)
    report = load_weights(make(), save(tmp_path / "best.safetensors", mixed))
    assert "a dualtoken_vit_tiny_mix, not a dualtoken_vit_tiny: only the tensors that both have are loaded" in str(
        report
    )
    assert report.new
    assert not load_weights(make(), save(tmp_path / "same.safetensors", make())).network


def test_classes_in_another_order_keep_their_rows(tmp_path):
    source = make().eval()
    torch.nn.init.normal_(source.head.bias)
    path = save(tmp_path / "best.safetensors", source)
    target = make().eval()
    report = load_weights(target, path, ("fox", "cat", "ewe", "dog"))
    x = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(target(x), source(x)[:, [3, 0, 2, 1]])
    assert report.new == report.ignored == ()
    assert "the same classes in another order" in str(report)
    assert load_weights(target, path, NAMES).classes == ""
    assert torch.equal(target.head.weight, source.head.weight)


def test_other_classes_of_the_same_number_leave_the_classifier_new(tmp_path):
    source = make()
    path = save(tmp_path / "best.safetensors", source)
    torch.manual_seed(5)
    target = make()
    before = target.head.weight.detach().clone().normal_()
    target.head.weight.data.copy_(before)
    report = load_weights(target, path, ("cat", "dog", "ewe", "yak"))
    assert set(report.new) == set(report.ignored) == {"head.weight", "head.bias"}
    assert "its 4 classes differ from the 4 here" in str(report)
    assert "the classifier is re-initialised" in str(report)
    assert torch.equal(target.head.weight, before)
    assert torch.equal(target.stages[2].blocks[0].mlp.fc1.weight, source.stages[2].blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_without_class_names_keeps_its_classifier(tmp_path, suffix):
    source, path = timm.create_model("resnet10t", num_classes=4), tmp_path / f"plain.{suffix}"
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(source.state_dict(), path)
    target = timm.create_model("resnet10t", num_classes=4)
    report = load_weights(target, path, NAMES)
    assert (report.new, report.classes) == ((), "")
    assert torch.equal(target.fc.weight, source.fc.weight)


def test_other_grid_and_channels_are_adapted(tmp_path):
    source = make()
    path = save(tmp_path / "best.safetensors", source)
    target = make(token_grid=4, in_chans=1)
    report = load_weights(target, path)
    assert report.new == ()
    assert set(report.adapted) == {"token_embed", "stem.stride2.0.conv.weight"}
    first = source.stem.stride2[0].conv.weight
    torch.testing.assert_close(target.stem.stride2[0].conv.weight, first.sum(1, keepdim=True))
    grid = source.token_embed.reshape(1, 7, 7, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, (4, 4), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(target.token_embed, resized)


def test_grey_weights_into_a_colour_network(tmp_path):
    source = make(in_chans=1)
    path = save(tmp_path / "best.safetensors", source, in_chans=1)
    target = make()
    load_weights(target, path)
    x = torch.randn(2, 1, 40, 40)
    torch.testing.assert_close(target.eval()(x.expand(-1, 3, -1, -1)), source.eval()(x), rtol=1e-4, atol=1e-4)


def test_checkpoints_of_timm_and_of_trainers(tmp_path):
    source = timm.create_model("resnet10t", num_classes=5)
    for name, content in {
        "plain.pth": source.state_dict(),
        "timm.pth.tar": {"epoch": 3, "state_dict": source.state_dict()},
        "ddp.pth": {"model": {f"module.{key}": value for key, value in source.state_dict().items()}},
        "lightning.ckpt": {"state_dict": {f"model.{key}": value for key, value in source.state_dict().items()}},
    }.items():
        torch.save(content, tmp_path / name)
        target = timm.create_model("resnet10t", num_classes=5, in_chans=2)
        report = load_weights(target, tmp_path / name)
        assert (report.new, report.ignored, report.adapted) == ((), (), ("conv1.0.weight",)), name
        torch.testing.assert_close(target.conv1[0].weight, adapt_input_conv(2, source.conv1[0].weight))


def test_a_vision_transformer_of_another_size(tmp_path):
    source = timm.create_model("test_vit", num_classes=3, img_size=160)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    target = timm.create_model("test_vit", num_classes=3, img_size=96)
    report = load_weights(target, tmp_path / "vit.pth")
    assert report.adapted == ("pos_embed",)
    assert report.new == ()


def test_another_architecture_is_refused(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(InputError, match=r"resnet\.pth has only \d+ of the \d+ tensors of dualtoken_vit_tiny"):
        load_weights(make(), tmp_path / "resnet.pth")
    path = save(tmp_path / "best.safetensors", timm.create_model("resnet10t", num_classes=4))
    with pytest.raises(InputError, match=r"best\.safetensors is a resnet10t and has only \d+ of the \d+"):
        load_weights(make(), path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("save_into", [lambda file: file.write(b"new"), lambda file: torch.save([torch.ones(9)], file)])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, save_into):
    path = tmp_path / "file"
    path.write_bytes(b"good")
    real = open

    def full(name, *args, **kwargs):
        return real("/dev/full", *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(InputError, match=r"the disk is full.*is kept"), atomic_write(path) as file:
        save_into(file)
    monkeypatch.undo()
    assert path.read_bytes() == b"good"


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"good")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_another_process_writes(tmp_path):
    """Nothing is mixed: the first goes on, the second ends; the lock is the system's, so it ends with the process."""
    path = tmp_path / "file"
    (tmp_path / ".file.tmp").write_bytes(b"left by a process that was killed")
    with atomic_write(path) as file:
        file.write(b"first")
        with pytest.raises(InputError, match="file is being written by another process"), atomic_write(path) as other:
            other.write(b"second")
    assert path.read_bytes() == b"first"
    folder = tmp_path / "folder"
    (tmp_path / ".folder.tmp" / "old").mkdir(parents=True)
    with atomic_folder(folder) as place:
        (place / "a").write_bytes(b"first")
        with pytest.raises(InputError, match="folder is being written by another process"), atomic_folder(folder):
            pass
    assert [each.name for each in folder.iterdir()] == ["a"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


def locks_fail(monkeypatch, code):
    def fail(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", fail)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    locks_fail(monkeypatch, code)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").touch()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [each.name for each in (tmp_path / "folder").iterdir()] == ["a"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_a_lock_that_fails_leaves_no_file_open(tmp_path, monkeypatch, write):
    def lowest():
        os.close(free := os.open(os.devnull, os.O_RDONLY))
        return free

    locks_fail(monkeypatch, errno.EIO)
    before = lowest()
    with pytest.raises(InputError, match=r"cannot write .*it: Input/output error"), write(tmp_path / "it"):
        pass
    assert lowest() == before


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(InputError, match="cannot write"), atomic_write(tmp_path / "runs" / "file") as file:
        file.write(b"new")
    assert (tmp_path / "runs").read_text() == "mine"


def test_what_is_written_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    with atomic_write(tmp_path / "file", "w") as file:
        file.write("ü")
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "file").read_bytes() == "ü".encode()


def test_other_errors_of_the_body_pass(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), atomic_write(tmp_path / "file"):
        raise RuntimeError("mine")
    with pytest.raises(InputError, match="Input/output error"), atomic_write(tmp_path / "file"):
        raise OSError(errno.EIO, "Input/output error")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_writer_that_begins_as_another_ends(tmp_path, monkeypatch, kind):
    """The second writer's temporary file has the name of the first one's: it must survive the end of the first."""
    path, replace, second = tmp_path / "it", os.replace, ExitStack()

    def begin(*args):
        replace(*args)
        monkeypatch.setattr("os.replace", replace)
        if kind == "folder":
            path.rmdir()
        opened.append(second.enter_context(write(path)))

    write, opened = (atomic_write if kind == "file" else atomic_folder), []
    monkeypatch.setattr("os.replace", begin)
    with write(path):
        pass
    if kind == "file":
        opened[0].write(b"second")
    else:
        (opened[0] / "second").touch()
    second.close()
    assert (path.read_bytes() == b"second") if kind == "file" else (path / "second").exists()


def test_values_for_a_file_that_was_replaced(tmp_path):
    path = tmp_path / "best.safetensors"
    save(path, model := make())
    of = checksum(path)
    torch.nn.init.ones_(model.head.bias)
    save(path, model)
    with pytest.raises(InputError, match="was replaced meanwhile"):
        store_preprocessing(path, of, temperature=2.0)
    assert "temperature" not in read_checkpoint(path).preprocessing
    store_preprocessing(path, checksum(path), temperature=2.0)
    assert read_checkpoint(path).preprocessing["temperature"] == 2.0


def test_patterns_are_no_names_of_weights():
    assert own_weights("dualtoken_vit_tiny_mix") is not None
    assert own_weights("dualtoken_vit_tiny_mi?") is None
    with pytest.raises(InputError, match="no such checkpoint"):
        locate("*")
