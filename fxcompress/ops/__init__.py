"""The fxc:: dialect: importing this package registers its operators with torch."""

from fxcompress.ops.quantizer import dequantize, quantize, unpack

__all__ = ["dequantize", "quantize", "unpack"]
