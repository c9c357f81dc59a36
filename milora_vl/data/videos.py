"""Video file -> frames: a fixed number spread evenly, or frames at a rate up to that number.

A video is decoded by torchcodec where it is installed and by PyAV elsewhere, both through
``transformers.video_utils``. The frames go to the model's own video processor, which also writes
the video's place in the prompt; see ``ImageReader``.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata, load_video

from milora_vl.data.images import MAX_IMAGE_PIXELS, BadImageError
from milora_vl.errors import MiloraError

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv", ".3gp",
)  # fmt: skip
# lists of other files and addresses, which a decoder would open in place of this one
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"[playlist]")


class VideoError(MiloraError, ImportError):
    """No decoder for videos is installed."""


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are shown.

    Attributes:
        frames: How many, spread evenly over the video; with ``per_second`` the most.
        per_second: Frames for each second of the video; None: ``frames``, however long it is.
        span_s: Start and end of the part that is shown, in seconds; None: the whole video.
    """

    frames: int = 8
    per_second: float | None = None
    span_s: tuple[float, float] | None = None

    def indices(self, metadata: VideoMetadata) -> np.ndarray:
        """Return the indices of the frames, int64, in order; a short video repeats some."""
        start, end = 0, metadata.total_num_frames
        if self.span_s is not None:
            start = min(int(self.span_s[0] * metadata.fps), end - 1)
            end = max(start + 1, min(int(self.span_s[1] * metadata.fps), end))
        count = self.frames
        if self.per_second is not None:
            wanted = int((end - start) / metadata.fps * self.per_second)
            count = max(1, min(wanted, count, end - start))
        return start + np.arange(count) * (end - start) // count


@dataclass(frozen=True)
class Video:
    """Frames of one video.

    Attributes:
        frames: uint8 [F, H, W, 3], RGB.
        total: Frames of the whole video.
        fps: Its frames per second.
        indices: Which of them ``frames`` are.
    """

    frames: np.ndarray
    total: int
    fps: float
    indices: tuple[int, ...]

    def metadata(self) -> VideoMetadata:
        """Return a new object, since processors write into it."""
        return VideoMetadata(
            total_num_frames=self.total,
            fps=self.fps,
            height=self.frames.shape[1],
            width=self.frames.shape[2],
            duration=self.total / self.fps,
            frames_indices=list(self.indices),
        )

    def blank(self) -> "Video":
        """Return the same with black frames, of which only one is held in memory."""
        frames = np.broadcast_to(np.uint8(0), (len(self.indices), *self.frames.shape[1:]))
        return Video(frames, self.total, self.fps, self.indices)

    def shape(self) -> tuple[Any, ...]:
        """Return all that the video's text in the prompt can depend on."""
        return (*self.frames.shape[1:], self.total, self.fps, self.indices)


def load_frames(path: Path | str, sampling: FrameSampling) -> Video:
    """Decode the frames of a video that a sampling chooses.

    Raises:
        BadImageError: If the file is missing, no video, damaged or too large; it is named.
        VideoError: If no decoder is installed.
    """
    return _read(path, sampling, whole=True)


def read_video_shape(path: Path | str, sampling: FrameSampling) -> Video:
    """Return what ``load_frames`` will give, with black frames; one frame is decoded.

    Raises:
        BadImageError: As ``load_frames``.
        VideoError: As ``load_frames``.
    """
    return _read(path, sampling, whole=False)


def _read(path: Path | str, sampling: FrameSampling, whole: bool) -> Video:
    chosen: list[np.ndarray] = []

    def choose(metadata: VideoMetadata, **_: Any) -> np.ndarray:
        if not metadata.total_num_frames or not metadata.fps:
            raise ValueError("it does not state its number of frames and their rate")
        if metadata.height * metadata.width > MAX_IMAGE_PIXELS:
            raise ValueError(f"a frame has more than the limit of {MAX_IMAGE_PIXELS} px")
        chosen.append(sampling.indices(metadata))
        return np.unique(chosen[0]) if whole else chosen[0][:1]  # decoders give each frame once

    backend = _find_decoder()
    try:
        with Path(path).open("rb") as file:
            if file.read(16).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(_PLAYLISTS):
                raise ValueError("it is a list of other files")
        frames, metadata = load_video(str(path), backend=backend, sample_indices_fn=choose)
        (indices,) = chosen
        present = np.asarray(frames)
        expected = len(np.unique(indices)) if whole else 1
        if len(present) != expected:
            raise ValueError(f"{len(present)} of {expected} frames can be decoded")
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # every decoder has its own ways to fail on a damaged file
        raise BadImageError(
            f"{path}: cannot be read as a video ({type(error).__name__}: {error})"
        ) from error
    if whole:
        present = present[np.searchsorted(np.unique(indices), indices)]
    video = Video(present, metadata.total_num_frames, float(metadata.fps), tuple(map(int, indices)))
    return video if whole else video.blank()


def _find_decoder() -> str:
    if importlib.util.find_spec("torchcodec"):
        return "torchcodec"
    if importlib.util.find_spec("av"):
        return "pyav"
    raise VideoError('no decoder for videos: pip install "milora_vl[video]"')
