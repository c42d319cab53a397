"""What a checked kernel verifies of its launch before it touches a tensor, and how a violation reads.

Checks are printed into the kernel.  All that a work item names is checked before its first element is computed: indices
against the lengths of the launch's tables, elements against the live storage behind each pointer.  In `update` the
index runs over the size of a segment, so that this covers every access and the arithmetic is the same.
"""

from collections.abc import Mapping, Sequence

VIOLATION = ("violation", "at", "first", "size", "limit")
"""Slots of a launch that tell what is wrong: 0 for nothing, the number of a table of the launch, or -1 less that of an
array; where in it; and what it names, of how much there is."""

_TABLES = {
    "first_segment": "item {at} takes the segments from {first} to {size}, of {limit}",
    "segment_tensor": "segment {at} is of tensor {first}, of {limit}",
    "coefficient_row": "tensor {at} takes row {first} of the coefficients, of {limit}",
}


def print_checks(slot: Mapping[str, int], held: Sequence[tuple[int, int]]) -> str:
    """Print the functions that check an item.

    Args:
        slot: the number of each slot of the launch, by its name.
        held: for each array the bytes of an element, and for how many elements of the tensor there is one.
    """
    arrays = (_ARRAY.format(array=i, itemsize=s, per=p, what=-1 - i) for i, (s, p) in enumerate(held))
    return _CHECKS.format(slot=slot, arrays="".join(arrays))


def explain_violation(violation: Sequence[int], slots: Sequence[str], arrays: Sequence[str]) -> str:
    """Return what the slots `VIOLATION` of a launch tell; `slots` names all of them, `arrays` those of the kernel."""
    what, at, first, size, limit = violation
    if what > 0:
        return _TABLES[slots[what]].format(at=at, first=first, size=size, limit=limit)
    name = arrays[-1 - what]
    return f"`{name}` of tensor {at}: {size} elements from {first}, of {limit} for which there is memory"


_CHECKS = '''\
def violated(launch, what, at, first, size, limit):
    """Tell what is wrong, unless another thread has told something."""
    if atomic_increment(launch + 8 * {slot[status]}) == 0:
        store(launch + 8 * {slot[at]}, at)
        store(launch + 8 * {slot[first]}, first)
        store(launch + 8 * {slot[size]}, size)
        store(launch + 8 * {slot[limit]}, limit)
        store(launch + 8 * {slot[violation]}, what)
    return False


def fits(launch, item):
    """Return whether all that an item names is there."""
    slots = array(launch, int64)
    tensors, segments = slots[{slot[tensors]}], slots[{slot[segments]}]
    first_segment = array(slots[{slot[first_segment]}], int64)
    segment_tensor = array(slots[{slot[segment_tensor]}], int64)
    segment_start = array(slots[{slot[segment_start]}], int64)
    segment_size = array(slots[{slot[segment_size]}], int64)
    pointers = array(slots[{slot[pointers]}], int64)
    limits = array(slots[{slot[limits]}], int64)
    coefficient_row = array(slots[{slot[coefficient_row]}], int64)
    first, end = first_segment[item], first_segment[item + 1]
    if not 0 <= first <= end <= segments:
        return violated(launch, {slot[first_segment]}, item, first, end, segments)
    for segment in range(first, end):
        tensor, start, size = segment_tensor[segment], segment_start[segment], segment_size[segment]
        if not 0 <= tensor < tensors:
            return violated(launch, {slot[segment_tensor]}, segment, tensor, 1, tensors)
        if not 0 <= coefficient_row[tensor] < slots[{slot[rows]}]:
            return violated(launch, {slot[coefficient_row]}, tensor, coefficient_row[tensor], 1, slots[{slot[rows]}])
{arrays}    return True


'''

_ARRAY = """\
        limit = max(limits[{array} * tensors + tensor] // {itemsize}, 0) if pointers[{array} * tensors + tensor] else 0
        limit = limit * {per}
        if start < 0 or start % {per} or not 0 <= size <= limit or start > limit - size:
            return violated(launch, {what}, tensor, start, size, limit)
"""
