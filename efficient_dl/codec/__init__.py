"""Tensors to bytes and back: codecs that know no rank and no training."""

from efficient_dl.codec.contract import Codec, PacketStats, Side
from efficient_dl.codec.entropy import order0_bits
from efficient_dl.codec.packet import FORMAT_VERSION
from efficient_dl.codec.registry import codec_names, make_codec

__all__ = ["FORMAT_VERSION", "Codec", "PacketStats", "Side", "codec_names", "make_codec", "order0_bits"]
