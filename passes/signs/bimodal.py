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
from torch import Tensor

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.numerics.peaks import peaks
from fxcompress.passes.signs.keys import Keys, Seen, change_keys
from fxcompress.rewrite import Context, Options, Reject, Transform
from fxcompress.transport import Kind, Plan


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
        return change_keys(on, edit, Kind.SIGN, self._signs, lambda signs: f"{int((signs < 0).sum())} of {len(signs)} signs turned")

    def _signs(self, keys: Keys, plan: Plan, seen: Seen) -> Tensor | Reject:
        signs = torch.where(plan.gather({keys.value: seen.mean}, "sum") < 0, -1.0, 1.0).double()
        if bool((signs > 0).all()):
            return Reject("no channel of {} that may change has a mean below 0", keys.value)
        if self.options.when == "gain":
            return seen.gaining(plan, keys, signs)
        count = peaks(seen.values)
        return signs if count == 2 else Reject("the values of {} have {} peaks, not two", keys.value, str(count))
