"""Faults: an open edit with one small thing wrong in it, as a slip in a pass would leave it, and whether the contracts notice.

    negate, transpose, wrong axis, roll by one, one more, halve one channel, keep the old one, swap two; one reader keeps the old value

A fault is planted after a pass has made its edit and before the edit is checked, in what the edit records: constants (`constants`), new nodes
(`nodes`), readers of replaced values (`readers`). It is equivalent if every value that the program's outputs depend on stays what it was, on
several random inputs (`trial`); by evaluation, never by argument. One in a pass that rounds is as good if every such value is as near to what
it was before the pass as without it: another scale may round as well. What else changes a value and isn't called broken has survived. `cases`
has the passes and what runs before them. `python -m tools.mutate` plants all of them.
"""

from collections.abc import Iterator

from fxcompress.edit import Edit
from tests.faults.constants import constant_faults
from tests.faults.fault import Fault
from tests.faults.nodes import node_faults
from tests.faults.readers import reader_faults


def faults(edit: Edit) -> Iterator[Fault]:
    """Every fault there is to plant in what an edit recorded."""
    yield from constant_faults(edit)
    yield from node_faults(edit)
    yield from reader_faults(edit)
