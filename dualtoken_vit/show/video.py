"""Videos and cameras as images, and images as videos: PyAV, the extra `video`."""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from PIL import Image

from dualtoken_vit.errors import InputError, first_line, pip_install
from dualtoken_vit.files import atomic_write, counted, printable

SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
WRITTEN = {".mkv": "matroska", ".mov": "mov", ".mp4": "mp4"}  # FFmpeg's names
CAMERAS = {"darwin": ("avfoundation", "{}"), "linux": ("v4l2", "/dev/video{}"), "win32": ("vfwcap", "{}")}


def is_video(path: Path) -> bool:
    """Whether this is a video by its name, or the number of a camera."""
    return path.suffix.lower() in SUFFIXES or (str(path).isdecimal() and not path.exists())


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise InputError(f"videos need PyAV: {pip_install('video')}") from error
    return av


class Video:
    """The frames of a video file, or of the camera of a number, as RGB images.

    Args:
        path: the file or number

    Raises:
        InputError: for a file that is no video, or a camera that cannot be opened; also while it is read.
    """

    def __init__(self, path: Path):
        self.av, self.name = _av(), printable(path)
        self.camera = str(path).isdecimal()
        kind, place = CAMERAS.get(sys.platform, CAMERAS["linux"]) if self.camera else (None, str(path))
        try:
            self.container = self.av.open(place.format(path) if self.camera else place, format=kind)
        except (self.av.FFmpegError, ValueError) as error:  # ValueError: of PyAV itself, for the kind of a camera
            what = f"camera {self.name}" if self.camera else self.name
            raise InputError(f"{what}: cannot be opened as a video: {first_line(error)}") from error
        if not self.container.streams.video:
            raise InputError(f"{self.name}: has no video stream")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.rate: Fraction = self.stream.average_rate or Fraction(25)  # frames per second
        self.seconds = self._duration()
        """Duration according to the file, with that of the last frame; 0: unknown."""
        known = self.stream.frames or round(self.seconds * self.rate)
        self.frames: int | None = None if self.camera else known or None
        """Number of frames according to the file; None: unknown."""

    def _duration(self) -> float:
        if self.stream.duration is not None:
            return float(self.stream.duration * self.stream.time_base)
        if stated := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", self.stream.metadata.get("DURATION", "")):  # Matroska
            hours, minutes, seconds = map(float, stated.groups())
            return 3600 * hours + 60 * minutes + seconds
        # The container's is that of its longest stream, which may be the sound.
        return (self.container.duration or 0) / self.av.time_base if len(self.container.streams) == 1 else 0.0

    def __iter__(self) -> Iterator[tuple[float, Image.Image]]:
        """Time in seconds, and image, of each frame."""
        count, seconds, end = 0, 0.0, 0.0
        try:
            for frame in self.container.decode(self.stream):
                count += 1
                seconds = float((count - 1) / self.rate if frame.time is None else frame.time)
                end = seconds + float(frame.duration * frame.time_base if frame.duration else 1 / self.rate)
                # The frame is stored unrotated, with the angle by which a player turns it counterclockwise.
                yield seconds, frame.to_image().rotate(frame.rotation, expand=True)
        except (self.av.FFmpegError, ValueError) as error:
            raise InputError(f"{self.name}: damaged after {counted(count, 'frame')}: {first_line(error)}") from error
        finally:
            self.container.close()
        if not self.camera and self.seconds - end > max(1, 0.05 * self.seconds):  # FFmpeg takes the end as it comes
            raise InputError(f"{self.name}: truncated: it ends after {end:.1f} of {self.seconds:.1f} seconds")


class VideoWriter(ExitStack):
    """A context that writes images as an H.264 video of the size of the first, atomically.

    Args:
        path: .mp4, .mkv or .mov
        rate: frames per second

    Raises:
        InputError: for another suffix, or where the file cannot be written.
    """

    def __init__(self, path: Path, rate: Fraction):
        if path.suffix.lower() not in WRITTEN:
            raise InputError(f"--out {path}: a video is written as {', '.join(WRITTEN)}")
        if path.is_dir():
            raise InputError(f"--out {path}: a folder; name a video")
        super().__init__()
        self.av, self.path, self.rate = _av(), path, rate
        self.stream: Any = None
        self.last = -1  # time stamp

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            file = stack.enter_context(atomic_write(self.path))
            self.container = self.av.open(file, "w", format=WRITTEN[self.path.suffix.lower()])
            stack.push(self._end)
            self.push(stack.pop_all())
        return self

    def _end(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Write what the encoder still holds, unless an error discards the file."""
        try:
            if kind is None and self.stream is not None:
                self.container.mux(self.stream.encode())
            self.container.close()
        except self.av.FFmpegError as error:
            if kind is None and not isinstance(error, OSError):  # atomic_write knows what to say of that
                raise InputError(f"cannot write {self.path}: {first_line(error)}") from error
            elif kind is None:
                raise

    def add(self, seconds: float, image: Image.Image) -> None:
        """Append an image, shown from this time on."""
        if self.stream is None:
            self.stream = self.container.add_stream("libx264", self.rate, options={"crf": "20", "preset": "veryfast"})
            self.stream.width, self.stream.height = (side + side % 2 for side in image.size)  # H.264 wants even sides
            self.stream.pix_fmt = "yuv420p"
            self.stream.codec_context.time_base = Fraction(1, 90_000)
        page = Image.new("RGB", (self.stream.width, self.stream.height), "white")
        page.paste(image)  # a drawing may have a longer legend than the first one, below the image
        frame = self.av.VideoFrame.from_image(page)
        frame.time_base = Fraction(1, 90_000)
        self.last = frame.pts = max(round(seconds * 90_000), self.last + 1)  # the encoder takes no step back
        self.container.mux(self.stream.encode(frame))
