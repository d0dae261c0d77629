"""Videos: their frames give what the same images give as files, and the written video is the drawings."""

import json
import os
import resource
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask
from pycocotools.mask import decode
from test_predict import checkpoint, constant  # noqa: F401  fixtures
from test_predictors import files  # noqa: F401

from dualtoken_vit import cli, load_predictor
from dualtoken_vit.errors import InputError
from dualtoken_vit.predict import predict
from dualtoken_vit.results import Objects
from dualtoken_vit.runtime.report import ObjectsReport, Report
from dualtoken_vit.show.drawing import draw_card
from dualtoken_vit.show.video import Video, VideoWriter

RATE = 5


def frames(count=7, size=(46, 38)):
    """Smooth random images, which compression leaves nearly as they are."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (count, 3, 4, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize(size, Image.Resampling.BICUBIC) for each in small]


def write(path, images, codec="ffv1", pixels="bgr0", metadata=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, RATE)
        stream.width, stream.height = images[0].size
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, RATE)
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def test_frames_are_predicted_as_images(checkpoint, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich, which redirects stdout while a bar is shown
    images = frames()
    clip = write(tmp_path / "clip.mkv", images)  # lossless
    assert cli.run(["predict", str(checkpoint), str(clip), "--json", "--batch-size", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["frame"] for line in lines] == list(range(7))
    assert [line["seconds"] for line in lines] == pytest.approx([n / RATE for n in range(7)], abs=1e-3)
    expected = load_predictor(checkpoint)(images)
    for line, one in zip(lines, expected, strict=True):
        assert [each["class"] for each in line["classes"]] == list(one.names)
        shares = [each["probability"] for each in line["classes"]]
        assert shares == pytest.approx(one.probabilities.tolist(), abs=1e-5)


def test_the_objects_in_each_frame_are_recorded(files, tmp_path, capsys):  # noqa: F811
    detector, images, out = files["detection"][0], frames(2), tmp_path / "out.mkv"
    assert predict(detector, (write(tmp_path / "clip.mkv", images),), out, json=True, score=0.0)
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    for line, one in zip(lines, load_predictor(detector, score=0.0)(images), strict=True):
        objects = json.loads(line)["objects"]
        assert len(objects) == len(one) > 0
        assert [each["class"] for each in objects] == list(one.names)
        assert [each["category_id"] for each in objects] == (one.labels + 1).tolist()
        assert [each["score"] for each in objects] == pytest.approx(one.scores.tolist(), abs=1e-5)
        boxes = np.array([each["bbox"] for each in objects])
        assert boxes[:, :2] + boxes[:, 2:] == pytest.approx(one.boxes[:, 2:], abs=1e-3)
        areas = [mask.area(each["segmentation"]) for each in objects]
        assert areas == one.masks.sum((1, 2)).tolist()


def test_the_written_video_shows_the_drawings(constant, tmp_path, capsys):  # noqa: F811
    images, out = frames(), tmp_path / "out" / "annotated.mp4"
    assert predict(constant, (write(tmp_path / "clip.mkv", images),), out)
    assert "7 frames" in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == ["annotated.jsonl", "annotated.mp4"]
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 7
    top = list(zip(("dog", "cat [x]", "bee", "ant"), (0.4, 0.3, 0.2, 0.1), strict=True))
    found = list(Video(out))
    assert [seconds for seconds, _ in found] == pytest.approx([n / RATE for n in range(7)], abs=1e-3)
    for (seconds, shown), image in zip(found, images, strict=True):
        card = draw_card(image, f"{seconds:.2f} s", top)
        expected = np.full((shown.height, shown.width, 3), 255)
        expected[: card.height, : card.width] = np.asarray(card)
        assert np.abs(np.asarray(shown).astype(int) - expected).mean() < 2
    assert av.open(str(out)).streams.video[0].codec_context.name == "h264"


def test_a_frame_has_its_objects():
    report = ObjectsReport(SimpleNamespace(category_ids=(3, 7), class_names=("cat", "dog")))
    masks = np.zeros((1, 4, 6), dtype=bool)
    masks[0, 1:3, 2:5] = True
    found = Objects(("dog",), np.array([1]), np.array([[2.0, 1, 5, 3]]), np.array([0.5]), masks)
    (one,) = json.loads(json.dumps(report.entry(found)))["objects"]
    assert np.array_equal(decode(one.pop("segmentation")), masks[0])
    assert one == {"class": "dog", "category_id": 7, "bbox": [2, 1, 3, 2], "score": 0.5}
    assert report.entry(replace(found, masks=None)) == {"objects": [one]}


def test_a_phone_held_upright(tmp_path):
    """Stored lying, with the angle at which to show it; made by ffmpeg's display matrix."""
    image = Image.new("RGB", (48, 32), "red")
    image.paste("blue", (0, 0, 24, 32))  # its left half
    path = write(tmp_path / "clip.mp4", [image] * 3, "libx264", "yuv420p")
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track, (a b u c d v x y w), in 16.16
    matrix = [0, 1 << 16, 0, -(1 << 16) & 0xFFFFFFFF, 0, 0, 32 << 16, 0, 1 << 30]  # a quarter turn clockwise
    path.write_bytes(data[:at] + b"".join(each.to_bytes(4, "big") for each in matrix) + data[at + 36 :])
    _, shown = next(iter(Video(path)))
    assert shown.size == (32, 48)
    assert shown.getpixel((16, 8))[2] > 200  # what was left is on top
    assert shown.getpixel((16, 40))[0] > 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no video", "cannot be opened as a video"),
        (b"", "cannot be opened as a video"),
        (None, "cannot be opened as a video: .*No such file"),
    ],
)
def test_what_is_no_video(constant, tmp_path, content, message):  # noqa: F811
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"clip\.mp4: {message}"):
        predict(constant, (path,), tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
    assert not (tmp_path / "out.jsonl").exists()


def test_mistakes(constant, tmp_path):  # noqa: F811
    clip = write(tmp_path / "clip.mkv", frames(2))
    with pytest.raises(InputError, match=r"--out .*out\.gif: a video is written as \.mkv, \.mov, \.mp4"):
        predict(constant, (clip,), tmp_path / "out.gif")
    with pytest.raises(InputError, match="is the video that is read"):
        predict(constant, (clip,), clip)
    with pytest.raises(InputError, match="give one video or camera, and no images beside it"):
        predict(constant, (clip, tmp_path))
    with pytest.raises(InputError, match="camera 97: cannot be opened"):
        predict(constant, (type(tmp_path)("97"),), json=True)
    for given in (clip, type(tmp_path)("0")):
        with pytest.raises(InputError, match=rf"{given}: there is no table of a video; give --out FILE\.mp4 or --json"):
            predict(tmp_path / "is not loaded", (given,))
    with pytest.raises(InputError, match="a video is written as"):
        predict(constant, (clip,), type(tmp_path)("."))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mkv"]
    for name in ("other.mp4", "other.jsonl"):
        other = tmp_path / name
        other.write_text("of somebody")
        with pytest.raises(InputError, match=rf"other\.mp4: .*{name} exists and is not from an earlier run"):
            predict(constant, (clip,), tmp_path / "other.mp4")
        assert other.read_text() == "of somebody"
        other.unlink()


def test_a_full_disk(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 96, 96, 3), dtype=np.uint8)

    def save():
        with VideoWriter(tmp_path / "out.mp4", Fraction(RATE)) as video:
            for number, pixels in enumerate(noise):
                video.add(number / RATE, Image.fromarray(pixels))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*out\.mp4"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_output_that_is_not_read_leaves_no_video(constant, tmp_path, monkeypatch):  # noqa: F811
    """It is an error of the pipe, which the command ends with (status 141), and none of the files."""
    clip = write(tmp_path / "clip.mkv", frames(2))
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), open(writer, "w", buffering=1) as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", pipe)
        with pytest.raises(BrokenPipeError):
            predict(constant, (clip,), tmp_path / "out.mp4", json=True)
    assert list(tmp_path.iterdir()) == [clip]


def test_a_video_without_frames(constant, tmp_path, monkeypatch):  # noqa: F811
    clip = tmp_path / "clip.mkv"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("ffv1", RATE)
        stream.width, stream.height, stream.pix_fmt = 46, 38, "bgr0"
        container.start_encoding()
    with pytest.raises(InputError, match=r"clip\.mkv: cannot be opened as a video: .*End of file"):
        predict(constant, (clip,), tmp_path / "out.mp4")
    write(clip, frames(1))
    monkeypatch.setattr(Video, "__iter__", lambda self: iter(()))
    with pytest.raises(InputError, match=r"clip\.mkv: has no frames"):
        predict(constant, (clip,), tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == [clip]


def test_time_that_steps_back(tmp_path):
    images = frames(4)
    with VideoWriter(tmp_path / "out.mp4", Fraction(RATE)) as video:
        for seconds, image in zip((0, 0.2, 0.2, 0.1), images, strict=True):
            video.add(seconds, image)
    assert [seconds for seconds, _ in Video(tmp_path / "out.mp4")] == pytest.approx([0, 0.2, 0.2, 0.2], abs=1e-3)


def test_a_truncated_video_keeps_what_could_be_read(constant, tmp_path, capsys):  # noqa: F811
    clip = write(tmp_path / "clip.mkv", frames(40))
    whole = clip.read_bytes()
    clip.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(InputError, match="truncated"):
        list(Video(clip))
    status = predict(constant, (clip,), tmp_path / "out.mp4")
    said = capsys.readouterr()
    count = len((tmp_path / "out.jsonl").read_text().splitlines())
    assert 20 < count < 40
    assert len(list(Video(tmp_path / "out.mp4"))) == count
    assert f"{count} frames" in said.out
    assert not status
    assert f"clip.mkv: truncated: it ends after {count / RATE:.1f} of 8.0 seconds" in said.err


@pytest.mark.parametrize(
    ("system", "place", "kind"),
    [("linux", "/dev/video0", "v4l2"), ("darwin", "0", "avfoundation"), ("win32", "0", "vfwcap")],
)
def test_a_camera(constant, tmp_path, monkeypatch, capsys, system, place, kind):  # noqa: F811
    """By the name of its device, for which a file stands in; until Ctrl-C ends it."""
    images, opened, open_file = frames(3), [], av.open
    clip = write(tmp_path / "clip.mkv", images)

    def open_device(name, *args, format=None, **options):
        if format not in ("v4l2", "avfoundation", "vfwcap"):
            return open_file(name, *args, format=format, **options)
        opened.append((name, format))
        return open_file(str(clip))

    def until_stopped(self):
        yield from read(self)
        raise KeyboardInterrupt

    read = Video.__iter__
    monkeypatch.setattr(av, "open", open_device)
    monkeypatch.setattr(Video, "__iter__", until_stopped)
    monkeypatch.setattr("dualtoken_vit.show.video.sys", SimpleNamespace(platform=system))
    monkeypatch.chdir(tmp_path)
    assert cli.run(["predict", str(constant), "0", "--json", "--out", "seen.mkv"]) == 0
    assert opened == [(place, kind)]
    said = capsys.readouterr()
    lines = (tmp_path / "seen.jsonl").read_text().splitlines()
    assert said.out.splitlines() == lines
    assert [json.loads(line)["frame"] for line in lines] == [0, 1, 2]
    assert "stopped after 3 frames" in said.err
    assert len(list(open_file(str(tmp_path / "seen.mkv")).decode(video=0))) == 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("case", ["longer sound", "slide show"])
def test_a_whole_video_is_not_truncated(tmp_path, suffix, case):
    path = tmp_path / f"clip{suffix}"
    rate = RATE if case == "longer sound" else Fraction(1, 5)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate)
        stream.width, stream.height, stream.pix_fmt = 46, 38, "yuv420p"
        sound = container.add_stream("aac", 8000) if case == "longer sound" else None
        for image in frames(6):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8 * 8000), np.float32), "fltp", "mono")  # 8 seconds
            silence.sample_rate = 8000
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    assert len(list(Video(path))) == 6


def with_sound(path, count):
    """A video of `count` frames, and of silence that lasts as long."""
    with av.open(str(path), "w") as container:
        stream, sound = container.add_stream("libx264", RATE), container.add_stream("aac", 8000)
        stream.width, stream.height, stream.pix_fmt = 46, 38, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000 // RATE), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        for image in frames(count):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(sound.encode(silence))
        container.mux(stream.encode())
        container.mux(sound.encode())
    return path


def test_a_truncated_video_with_sound(tmp_path):
    clip = with_sound(tmp_path / "clip.mkv", 60)
    assert Video(clip).frames == len(list(Video(clip))) == 60
    whole = clip.read_bytes()
    clip.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"truncated: it ends after \d\.\d of 12\.\d seconds"):
        list(Video(clip))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_last_frame_that_is_shown_for_long(tmp_path, suffix):
    path, base = tmp_path / f"clip{suffix}", Fraction(1, 10)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", 10)
        stream.width, stream.height, stream.pix_fmt = 46, 38, "yuv420p"
        for number, image in enumerate(frames(10)):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = number, base
            for packet in stream.encode(frame):
                packet.duration = 300 if number == 9 else 1
                container.mux(packet)
        container.mux(stream.encode())
    assert Video(path).seconds > 30
    assert len(list(Video(path))) == 10


def test_a_video_that_is_interrupted_keeps_the_former_files(constant, tmp_path, monkeypatch):  # noqa: F811
    clip, out = write(tmp_path / "clip.mkv", frames(5)), tmp_path / "out.mp4"
    assert predict(constant, (clip,), out)
    before = {path: path.read_bytes() for path in (out, tmp_path / "out.jsonl")}
    read = Video.__iter__

    def interrupted(self):
        yield from islice(read(self), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(Video, "__iter__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(constant, (clip,), out, batch_size=1)
    assert {path: path.read_bytes() for path in before} == before


def test_both_files_of_a_video_or_neither(constant, tmp_path, monkeypatch):  # noqa: F811
    """The video can fail at its very end, when what the encoder holds is written."""
    clip, out = write(tmp_path / "clip.mkv", frames(2)), tmp_path / "out.mp4"
    (folder := tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match=r"folder\.mp4: a folder; name a video"):
        predict(constant, (clip,), folder)
    assert not (tmp_path / "folder.jsonl").exists()
    predict(constant, (clip,), out)
    before = {path: path.read_bytes() for path in (out, tmp_path / "out.jsonl")}

    def fail(writer, kind, *_):
        raise av.error.ExternalError(1, "made to fail")

    monkeypatch.setattr(VideoWriter, "_end", fail)
    write(clip, frames(3))
    with pytest.raises((InputError, av.error.FFmpegError)):
        predict(constant, (clip,), out)
    assert {path: path.read_bytes() for path in before} == before


def test_an_encoder_that_fails_at_the_end(tmp_path, monkeypatch):
    class Container:
        def close(self):
            raise av.error.ExternalError(1, "made to fail")

    writer = VideoWriter(tmp_path / "out.mp4", Fraction(RATE))
    with pytest.raises(InputError, match=r"cannot write .*out\.mp4: .*made to fail"), writer as video:
        video.container = Container()
    assert not list(tmp_path.iterdir())


def test_a_frame_that_cannot_be_drawn_is_shown_as_it_is(constant, tmp_path, monkeypatch, capsys):  # noqa: F811
    clip = write(tmp_path / "clip.mkv", frames(2))
    for each in Report.__subclasses__():
        monkeypatch.setattr(each, "draw", lambda *args: 1 / 0)
    assert predict(constant, (clip,), tmp_path / "out.mp4")
    assert "warning: cannot save" in capsys.readouterr().err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(list(Video(tmp_path / "out.mp4"))) == 2
