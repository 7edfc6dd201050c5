"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdxl_core.buckets import Bucket
from sdxl_core.catalog.images import ImagePlace
from sdxl_core.latents.formats import LatentRecord

STAGES = ("read", "decode", "transfer", "vae", "write")
Rejection = tuple[str, str, str]  # key, reason, detail


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to encode: its key, and where its bytes are."""

    key: str
    place: ImagePlace


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPicture:
    """A picture with its latents, all finite. `ar_error`: the bucket's minus the picture's aspect ratio."""

    picture: Picture
    record: LatentRecord
    bucket: Bucket
    ar_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedGroup:
    """A commit group, to be written. Pictures and rejections together are the group's pictures, each in their order.

    notes: `halved` for each batch that did not fit into memory, `float32` for each that overflowed in half precision.
    """

    number: int
    pictures: tuple[EncodedPicture, ...]
    rejected: tuple[Rejection, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """How a run went.

    seconds:  of work, by stage; stages overlap, and `decode` sums over its threads.
    busy:     share of the wall time that each stage was at work (of decoding: of all its threads).
    bound_by: the busiest stage: what an improvement would have to start with.
    num_encoded, num_rejected: pictures.   wall_s: from start to the last commit.
    """

    num_encoded: int
    num_rejected: int
    wall_s: float
    seconds: Mapping[str, float]
    busy: Mapping[str, float]
    bound_by: str
    images_per_s: float
