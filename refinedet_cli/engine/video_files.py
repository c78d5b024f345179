"""Video files and cameras as a row of pictures, and pictures as a video file; all that knows PyAV."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.words import counted
from refinedet_cli.data.images import is_file, open_regular
from refinedet_cli.errors import DataError, RefineDetError, UsageError

# The extensions that make a file a video. Without .ts and .mts, which are TypeScript more often than not.
VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv", ".mxf"}
)
CAMERA = "camera:"

# What encodes annotated videos, the first that PyAV's build has, and the finest clock that it takes.
_ENCODERS = (("libx264", None), ("libopenh264", None), ("mpeg4", 65535))
_ENCODER_OPTIONS = {"libx264": {"crf": "20", "preset": "veryfast"}}
_DEFAULT_RATE = Fraction(30)
# A header may be a bit off, and sound may go on behind the last picture: less than this is no sign of damage.
_MISSING_SHARE, _MISSING_SECONDS = 0.05, 0.5

Pixels = NDArray[np.uint8]


class Frame(NamedTuple):
    """One picture of a video.

    Attributes:
        number: its place, counted from 0.
        time: when it is shown, in seconds, as the file says it; exact.
        pixels: uint8[H, W, 3], RGB, turned as players show it.
    """

    number: int
    time: Fraction
    pixels: Pixels


@dataclass(frozen=True)
class VideoFacts:
    """What a video says of itself before it is decoded.

    Attributes:
        rate: frames a second, on average.
        time_base: the unit of its clock, in seconds.
        frames: how many there are; an estimate where the file does not count them, None where nothing is known.
        seconds: how long it is; None where nothing is known.
        pixel_aspect: width of a pixel over its height.
    """

    rate: Fraction
    time_base: Fraction
    frames: int | None
    seconds: float | None
    pixel_aspect: Fraction


def is_video_name(name: str) -> bool:
    """Tell whether a file is a video by its extension; hidden files are none."""
    return not name.startswith(".") and Path(name).suffix.lower() in VIDEO_EXTENSIONS


def is_camera(source: str) -> bool:
    """Tell whether a source names a camera, as in ``camera:0``."""
    return source.startswith(CAMERA)


class UnreadableVideoError(DataError):
    """A video that holds nothing that can be decoded."""


def expand_pattern(source: str) -> list[str]:
    """List the videos that a pattern such as ``clips/*.mp4`` matches, sorted; a file or camera stands for itself.

    Raises:
        DataError: the pattern matches none.
    """
    if is_camera(source) or is_file(Path(source)) or not glob.has_magic(source):
        return [source]
    matches = glob.glob(source)  # noqa: PTH207 - as for pictures: Path.glob knows no absolute patterns
    if not (found := sorted(path for path in matches if is_video_name(Path(path).name) and is_file(Path(path)))):
        raise DataError(f"the pattern {source!r} matches no videos", "check it")
    return found


def decoder_name() -> str:
    """The library that decodes, with its version.

    Raises:
        UsageError: it is not installed.
    """
    return f"PyAV {_pyav().__version__}"


class VideoReader:
    """A video file or camera that is open; a context manager.

    Args:
        source: a path, or ``camera:`` and its number (on Windows its name).

    Attributes:
        source, name: as given, and what it is called in results: the file's name.
        live: whether it is a camera, which has no end.
        facts: what the file says of itself.
        decoded: frames that were decoded so far.

    Raises:
        UsageError: PyAV is not installed, or the camera is not named as it must be.
        DataError: there is no such file or camera, or it is no video.
    """

    def __init__(self, source: str) -> None:
        self._av = _pyav()
        self.source = source
        self.live = is_camera(source)
        self.name = source.replace(":", "-") if self.live else Path(source).name
        self._container = self._open_camera() if self.live else self._open_file()
        if not self._container.streams.video:
            self._container.close()
            raise UnreadableVideoError(f"{source} holds no video", "name a file with moving pictures")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            self._container.close()
            raise UnreadableVideoError(f"{source}: PyAV has no decoder for its pictures", "convert it to H.264")
        self._stream.thread_type = "AUTO"
        self.facts = _facts(self._container, self._stream)
        self.decoded = 0
        self._damaged = 0
        self._start = self._end = Fraction(0)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def frames(self) -> Iterator[Frame]:
        """Decode the frames one after the other, in the order in which they are shown.

        What cannot be decoded is left out; `trouble` tells of it afterwards.
        """
        previous: Fraction | None = None
        for frame in self._decoded():
            time = self._end if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
            if previous is not None and time <= previous:
                time = previous + self.facts.time_base  # damaged clocks go backwards, and no player would follow
            if previous is None:
                self._start = time
            previous, self._end = time, time + 1 / self.facts.rate
            self._damaged += bool(frame.is_corrupt)
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            self.decoded += 1
            yield Frame(self.decoded - 1, time, pixels)

    @property
    def end(self) -> float:
        """When the frame that was decoded last ends, in seconds."""
        return float(self._end)

    def trouble(self) -> str | None:
        """Say in one line what was wrong with a file that was decoded to its end; None where nothing was."""
        seconds = self.facts.seconds
        shown = float(self._end - self._start)
        frames = counted(self.decoded, "frame")
        if seconds is not None and not self.live and seconds - shown > max(_MISSING_SECONDS, _MISSING_SHARE * seconds):
            return f"{self.source} is cut off or damaged: {shown:.1f} of {seconds:.1f} s could be decoded, {frames}"
        if self._damaged:
            return f"{self.source} is damaged in {self._damaged:,} places; {frames} could be decoded"
        return None

    def _decoded(self) -> Iterator[Any]:
        try:
            for packet in self._container.demux(self._stream):
                yield from self._decode(packet)
        except self._av.FFmpegError:
            self._damaged += 1
            yield from self._decode(None)

    def _decode(self, packet: Any) -> list[Any]:
        """Decode a packet, or what the decoder has held back; damage costs this packet alone."""
        try:
            return list(self._stream.codec_context.decode(packet))
        except self._av.FFmpegError as error:
            self._damaged += not isinstance(error, self._av.error.EOFError)
            return []

    def _open_file(self) -> Any:
        path = Path(self.source)
        with open_regular(path):
            pass
        try:
            # The prefix and the list keep a name or a playlist in disguise from opening anything but a file.
            return self._av.open(f"file:{path}", options={"protocol_whitelist": "file"})
        except self._av.FFmpegError as error:
            raise UnreadableVideoError(
                f"{path} is not a video that can be read ({error.strerror})",
                "copy it again; a recording that broke off before its end may have to be repaired first",
            ) from None

    def _open_camera(self) -> Any:
        name, kind = _camera(self.source.removeprefix(CAMERA))
        try:
            return self._av.open(name, format=kind)
        except (self._av.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{self.source} cannot be opened: {name}: {reason}",
                "is it connected, allowed to be used, and free?",
            ) from None


class VideoWriter:
    """A video file under way: H.264 where PyAV has an encoder for it, else MPEG-4; a context manager.

    Args:
        file: to write an MP4 to; can seek.
        facts: of the video whose times and rate this one is to have.
        size: height and width of its pictures. H.264 needs even ones, so the last row or column may be doubled.

    Attributes:
        encoder: what encodes.

    Raises:
        UsageError: PyAV has no encoder.
    """

    def __init__(self, file: BinaryIO, facts: VideoFacts, size: tuple[int, int]) -> None:
        self._av = _pyav()
        self.encoder, finest = _encoder(self._av)
        self._size = size
        self._container = self._av.open(file, "w", format="mp4")
        self._stream = self._container.add_stream(
            self.encoder, rate=facts.rate, options=_ENCODER_OPTIONS.get(self.encoder, {})
        )
        self._clock = facts.time_base if finest is None else max(facts.time_base, Fraction(1, finest))
        height, width = size
        self._stream.height, self._stream.width = height + height % 2, width + width % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = self._clock
        self._stream.codec_context.sample_aspect_ratio = facts.pixel_aspect
        self._duration = max(1, round(1 / facts.rate / self._clock))
        self._last = -1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()

    def write(self, pixels: Pixels, time: Fraction) -> None:
        """Append a picture.

        Args:
            pixels: uint8[H, W, 3], RGB; of another size than the video's it is fitted to that.
            time: when it is shown, in seconds; later than the one before.
        """
        height, width = pixels.shape[:2]
        even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        frame = frame.reformat(width=self._stream.width, height=self._stream.height, format="yuv420p")
        self._last = max(self._last + 1, round(time / self._clock))
        frame.pts, frame.time_base, frame.duration = self._last, self._clock, self._duration
        self._container.mux(self._stream.encode(frame))


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError:
        raise UsageError(
            "videos need the package PyAV, which is not installed", 'pip install "refinedet[video]"'
        ) from None
    module: ModuleType = av
    return module


def _encoder(av: ModuleType) -> tuple[str, int | None]:
    for name, finest in _ENCODERS:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name, finest
    names = ", ".join(name for name, _ in _ENCODERS)
    raise UsageError(f"PyAV has none of the encoders {names}", "install PyAV from PyPI, or add --no-draw")


def _facts(container: Any, stream: Any) -> VideoFacts:
    base = stream.time_base or Fraction(1, 1000)
    rate = stream.average_rate or stream.guessed_rate or _DEFAULT_RATE
    # The file's length counts the sound too, the stream's the pictures that an edit has cut off.
    known = [float(stream.duration * base)] if stream.duration else []
    known += [container.duration / 1_000_000] if container.duration else []
    seconds = min(known, default=None)
    frames = stream.frames or (None if seconds is None else round(seconds * rate))
    return VideoFacts(rate, base, frames, seconds, stream.sample_aspect_ratio or Fraction(1))


def _camera(name: str) -> tuple[str, str]:
    """What FFmpeg calls a camera on this system, and through what it reads it."""
    if sys.platform == "win32":
        if name.isdecimal():
            raise _camera_error(name, "on Windows cameras have names: camera:Integrated Camera")
        return f"video={name}", "dshow"
    if not name.isdecimal():
        raise _camera_error(name, "cameras are numbered from 0: camera:0")
    return (name, "avfoundation") if sys.platform == "darwin" else (f"/dev/video{name}", "v4l2")


def _camera_error(name: str, hint: str) -> RefineDetError:
    return UsageError(f"{CAMERA}{name} names no camera", hint)
