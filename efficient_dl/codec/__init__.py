"""Tensors to bytes and back: codecs that know no rank and no training."""

from efficient_dl.codec.contract import Codec, PacketStats, Side
from efficient_dl.codec.entropy import order0_bits
from efficient_dl.codec.packet import FORMAT_VERSION, dropped_blocks
from efficient_dl.codec.registry import codec_names, make_codec
from efficient_dl.codec.segment_bits import SegmentBits, segment_bits

__all__ = [
    "FORMAT_VERSION",
    "Codec",
    "PacketStats",
    "SegmentBits",
    "Side",
    "codec_names",
    "dropped_blocks",
    "make_codec",
    "order0_bits",
    "segment_bits",
]
