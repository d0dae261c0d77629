"""Images and settings that several tests share."""

import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

# What the platforms leave out, by file or by file and test, and why. They have not been tried by hand.
NO_PROC = {
    f"test_benchmark.py::{name}": "the peak memory is read from /proc"
    for name in ("test_memory_of_a_fresh_process", "test_training_table")
}
CAPITALS = {
    "test_convert.py::test_a_disk_that_takes_capitals_for_small_letters": "the disk is one itself",
    "test_yolo.py::test_label_files_in_capitals_are_an_error": "the disk takes capitals for small letters",
}
MACOS = NO_PROC | CAPITALS
WINDOWS = MACOS | {
    "test_checkpoint.py::test_a_file_that_another_process_writes": "Windows has no locks of this kind",
    "test_cli.py::test_bash_completes_commands_recipes_and_flags": "needs bash",
    "test_distributed.py": "starts processes by forkserver",
    "test_resume.py": "ends processes by SIGKILL",
    "test_run_folder.py": "ends processes by SIGKILL",
    "test_security.py": "file permissions and names that Windows does not have",
    "test_study.py": "stops processes by SIGTERM and SIGINT",
    "test_tasks.py": "ends processes by SIGKILL",
    "test_video.py": "limits the size of files by `resource`",
}
SKIPPED = {"win32": WINDOWS, "darwin": MACOS}.get(sys.platform, {})
collect_ignore = [name for name in SKIPPED if "::" not in name]


def pytest_collection_modifyitems(items):
    for item in items:
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        if name in SKIPPED:
            item.add_marker(pytest.mark.skip(reason=SKIPPED[name]))


@pytest.fixture(scope="session", autouse=sys.platform == "darwin")
def no_mps():
    """The device `auto` is the CPU: the GPU of a virtual Mac often lacks memory, and its last digits differ.

    For the whole session, as fixtures of modules train and evaluate, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        patch.setenv("DISABLE_MPS", "1")  # for Lightning
        yield


@pytest.fixture
def avx512(monkeypatch):
    """A processor of AMD with AVX-512, on which `linear` uses oneDNN, which computes the same on others."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("dualtoken_vit.models.layers.is_intel", lambda: False)


@pytest.fixture(params=[1, 2], ids="{}-threads".format)
def threads(request, avx512):
    """Run the test with one thread and with two, with `avx512`."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(monkeypatch):
    """One thread here and in processes that are started: the order of sums depends on their number."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def closed():
    """An address that nobody listens at."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        yield "http://127.0.0.1:{1}".format(*own.getsockname())


@pytest.fixture(scope="session")
def _photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("source") / "photos"
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = rng.integers(24, 61, 2)
                pixels = rng.integers(0, 120, (height, width, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.jpg", quality=90)
    return root


@pytest.fixture
def photos(_photos, tmp_path):
    """A fresh image-folder tree: {train,val}/{blue,green,red}/, 12 and 6 noisy JPEGs a class, 24 to 60 px a side."""
    return shutil.copytree(_photos, tmp_path / "photos")


@pytest.fixture(scope="module")
def trained(_photos, tmp_path_factory):
    """(the photos, the folder of a run that learnt to tell them apart)"""
    from tiny_runs import recipe, train  # a bare install has the models only

    out = tmp_path_factory.mktemp("trained") / "run"
    train(recipe(_photos, optim={"epochs": 6, "lr": 0.01}, data={"crop_pct": 0.9}), out)
    return _photos, out


@pytest.fixture
def tree(tmp_path):
    """Two training images and one for validation, 20x12 with labels 0 to 2 and 255; classes sky, road, car."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (12, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{index}.jpg")
            labels = rng.integers(0, 3, (12, 20)).astype(np.uint8)
            labels[0, :5] = 255
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"{index}.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ncar\n")
    return tmp_path


@pytest.fixture
def export(tmp_path):
    """Writes one of `label_files.EXPORTS`, with some files changed or (None) left out, into a folder."""
    from label_files import EXPORTS, save  # a bare install has the models only

    def write(kind, **changes):
        for name, content in (EXPORTS[kind] | changes.pop("files", {})).items():
            if content is not None:
                save(tmp_path / kind, name, content)
        return tmp_path / kind

    return write


@pytest.fixture
def classifier(tmp_path):
    """`tiny_files.save_classifier`"""
    from tiny_files import save_classifier  # a bare install has the models only

    return save_classifier(tmp_path / "classifier.onnx")


@pytest.fixture
def segmenter(tmp_path):
    """`tiny_files.save_segmenter`"""
    from tiny_files import save_segmenter  # as above

    return save_segmenter(tmp_path / "segmenter.onnx")


@pytest.fixture
def image():
    """`tiny_files.smooth_image`"""
    from tiny_files import smooth_image  # as above

    return smooth_image()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An untrained classifier of three classes."""
    import timm
    from tiny_files import classifier_file  # as above
    from tiny_graphs import SHALLOW

    torch.manual_seed(0)
    model = timm.create_model("dualtoken_vit_tiny", num_classes=3, **SHALLOW).eval()
    return classifier_file(tmp_path_factory.mktemp("run") / "best.safetensors", model, SHALLOW)


@pytest.fixture(scope="session")
def exported(checkpoint):
    """The file of `checkpoint`, with attention maps."""
    from dualtoken_vit.deploy.export import export

    return export(checkpoint, attention=True)
