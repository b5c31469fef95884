"""Metrics: of whole models here; of tensors in `numerics.noise`, of which `sqnr` is passed on."""

from fxcompress.evaluate.perplexity import Perplexity, perplexity
from fxcompress.numerics.noise import sqnr

__all__ = ["Perplexity", "perplexity", "sqnr"]
