"""Signs go into queries and keys so that the channels of the keys lie on one side of 0.

    q k = (q g)(k g),    g_c = -1 where the mean of key channel c is below 0, else 1

Keys whose channels have means near +m and -m fill two lumps with a void between them, and one range must hold both. With the signs folded into
the weights that make queries and keys, all channels lie near +m: the range halves, the attention stays, bit for bit. A site is an attention;
channels that some op can't tell apart (heads with one norm, rotary pairs) get one sign. Declined with the op that stops it, and where the
range of the keys wouldn't shrink, or, with `when: two_peaks`, where the distribution hasn't exactly two peaks, as published. Costs nothing at
run time. Source: PTQ4SAM (arXiv 2405.03144), section 3.2; a mean of 0 gets the sign 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.numerics.peaks import peaks
from fxcompress.passes.signs.keys import Keys, Seen, keys_of, observed
from fxcompress.rewrite import Context, Options, Reject, Transform
from fxcompress.transport import Kind, Plan, Transport

GAIN = 0.99  # of the range, squared: what a uniform quantiser's noise goes with


class BimodalOptions(Options):
    """when: fold where the keys' range shrinks, or only where the distribution has two peaks."""

    when: Literal["gain", "two_peaks"] = "gain"


class Bimodal(Transform):
    """Fold signs into the queries and keys of every attention that gains."""

    name = "signs.bimodal"
    contract = Exact(limit=0.0)
    Options = BimodalOptions
    excludes = frozenset({"quantised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site an attention."""
        declined: dict[str, Reject] = {}
        engine = Transport(on.program)
        plans = {keys: engine.solve(Kind.SIGN, keys.seed) for keys in keys_of(on.program) if on.admits(keys.node)}
        seen = observed(plans, on)
        for keys, plan in plans.items():
            answer = self._signs(keys, plan, seen[keys])
            if isinstance(answer, Reject):
                declined[keys.node.name] = answer
            else:
                plan.apply(edit, answer, f"{int((answer < 0).sum())} of {plan.count} signs turned", at=keys.node)
        return declined

    def _signs(self, keys: Keys, plan: Plan, seen: Seen) -> torch.Tensor | Reject:
        if not plan.count:
            return Reject("{}", plan.reason())
        signs = torch.where(plan.gather({keys.value: seen.mean}, "sum") < 0, -1.0, 1.0).double()
        if bool((signs > 0).all()):
            return Reject("no channel of {} that may change has a mean below 0", keys.value)
        if self.options.when == "two_peaks":
            count = peaks(seen.values)
            return signs if count == 2 else Reject("the values of {} have {} peaks, not two", keys.value, str(count))
        span = seen.span(plan, keys, signs)
        return signs if span**2 < GAIN else Reject("the range of {} would be {} of what it is", keys.value, f"{span:.3f}")
