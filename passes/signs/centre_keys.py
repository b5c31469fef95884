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

import torch

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.passes.signs.keys import Keys, Seen, keys_of, observed
from fxcompress.rewrite import Context, Reject, Transform
from fxcompress.transport import Kind, Plan, Transport

GAIN = 0.99  # of the range, squared


class CentreKeys(Transform):
    """Centre the keys of every attention that gains."""

    name = "signs.centre_keys"
    contract = Exact()
    excludes = frozenset({"quantised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site an attention."""
        declined: dict[str, Reject] = {}
        engine = Transport(on.program)
        plans = {keys: engine.solve(Kind.SHIFT, keys.seed) for keys in keys_of(on.program) if on.admits(keys.node)}
        seen = observed(plans, on)
        for keys, plan in plans.items():
            answer = _shifts(keys, plan, seen[keys])
            if isinstance(answer, Reject):
                declined[keys.node.name] = answer
            else:
                plan.apply(edit, answer, f"up to {float(answer.abs().max()):.3g} taken off keys", at=keys.node)
        return declined


def _shifts(keys: Keys, plan: Plan, seen: Seen) -> torch.Tensor | Reject:
    """What is added to each class of channels: minus the middle of its range."""
    if not plan.count:
        return Reject("{}", plan.reason())
    shifts = -(plan.gather({keys.value: seen.lo}, "amin") + plan.gather({keys.value: seen.hi}, "amax")) / 2
    span = seen.span(plan, keys, shifts)
    return shifts if span**2 < GAIN else Reject("the range of {} would be {} of what it is", keys.value, f"{span:.3f}")
