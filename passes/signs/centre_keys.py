"""What is added to all keys of an attention alike is taken off again: softmax doesn't see it.

    q (k_n - c) = q k_n - q c,    and q c is the same for every key n

A site is an attention; c is the middle of each key channel's range, taken off the bias of what makes the keys, which gets one if it has none.
Every offset of a channel goes, so that one range holds all channels about 0: more than signs can do. Legal where a softmax over the keys reads
the scores and nothing else sees the keys; a rotary embedding, a norm or a soft cap in between, a value that is the keys, a cache of them, stop
it, and are named. Exact but for rounding, and free at run time.
Source: the gauge of softmax; PTQ4SAM (arXiv 2405.03144) folds signs for the same end.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.passes.signs.keys import Keys, Seen, change_keys
from fxcompress.rewrite import Context, Reject, Transform
from fxcompress.transport import Kind, Plan


class CentreKeys(Transform):
    """Centre the keys of every attention that gains."""

    name = "signs.centre_keys"
    contract = Exact()
    excludes = frozenset({"quantised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site an attention."""
        return change_keys(on, edit, Kind.SHIFT, _shifts, lambda shifts: f"up to {float(shifts.abs().max()):.3g} taken off keys")


def _shifts(keys: Keys, plan: Plan, seen: Seen) -> Tensor | Reject:
    """What is added to each class of channels: minus the middle of its range."""
    middle = (plan.gather({keys.value: seen.lo}, "amin") + plan.gather({keys.value: seen.hi}, "amax")) / 2
    return seen.gaining(plan, keys, -middle)
