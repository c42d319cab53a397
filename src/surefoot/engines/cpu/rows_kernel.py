"""The rows kernel: from the indices of sparse gradients to a launch of rows, each of which it has once.

Not imported: `sparse` compiles this file's text as it does kernels, after a line that defines what they share.  It
verifies every index, puts rows in order, adds up the values of repeated ones as torch's `coalesce` does, and writes the
tables of a launch: where in each array each row stands, and how rows are cut into segments and work items.
"""

# Places in bytes: in what the kernel is handed, in what it is told of each table, in the launch that it writes.
(
    O_STATUS, O_COUNT, O_LAUNCH, O_TABLES, O_TABLE_SIZE, O_ARRAYS, O_DIMENSIONS, O_SCRATCH, O_COUNTS, O_SUMS,
    O_KIND, O_OWNER,
) = OURS  # fmt: skip
(
    T_NUMBER, T_COEFFICIENT_ROW, T_COUNT, T_DIMENSIONS, T_INDICES, T_VALUES, T_ELEMENTS, T_BYTES, T_KEYS,
    T_PLACES, T_SIZES,
) = TABLE  # fmt: skip
(
    L_WORK_ITEMS, L_FIRST_SEGMENT, L_SEGMENT_TENSOR, L_SEGMENT_START, L_SEGMENT_SIZE, L_POINTERS,
    L_COEFFICIENT_ROW, L_TENSORS, L_SEGMENTS,
) = LAUNCH  # fmt: skip
CHUNK, LARGEST_ITEM, FEWEST_ITEMS = CUTS
WORD, HALF = 8, 4  # bytes
DIGIT, DIGITS = 8, 256
ASCENDING, OUTSIDE = -1, -2
OTHER, SINGLE = 0, 1  # kinds of values; those of another are not added up


def at(what, place):
    """Return the word at a place in something."""
    return load(what + place)


def read_keys(table, keys, places):
    """Number the rows of a table that its indices name.

    Returns:
        The largest number; ASCENDING if they do, so that nothing is left to do; OUTSIDE if an index is.
    """
    count, dimensions, indices = at(table, T_COUNT), at(table, T_DIMENSIONS), load(at(table, T_INDICES))
    sizes, largest, before, ascend = table + T_SIZES, int64(0), int64(-1), True
    for row in range(0, count * WORD, WORD):
        key, place = int64(0), indices + row
        for dimension in range(0, dimensions * WORD, WORD):
            index, size = load(place), load(sizes + dimension)
            if not 0 <= index < size:
                return int64(OUTSIDE)
            key = key * size + index
            place += count * WORD
        store(keys + row, key)
        store(places + row, row // WORD)
        ascend &= key > before
        largest, before = max(largest, key), key
    return int64(ASCENDING) if ascend else largest


def sort(table, keys, places, others, counts, largest):
    """Sort numbers and places, digit by digit from the last, and note in the table where they are then."""
    end, spare, shift = at(table, T_COUNT) * WORD, others + at(table, T_COUNT) * WORD, 0
    while shift < 64 and largest >> shift:
        for digit in range(0, DIGITS * WORD, WORD):
            store(counts + digit, 0)
        for row in range(0, end, WORD):
            digit = counts + (load(keys + row) >> shift & (DIGITS - 1)) * WORD
            store(digit, load(digit) + 1)
        total = int64(0)
        for digit in range(0, DIGITS * WORD, WORD):
            found = load(counts + digit)
            store(counts + digit, total)
            total += found
        for row in range(0, end, WORD):
            digit = counts + (load(keys + row) >> shift & (DIGITS - 1)) * WORD
            new = load(digit) * WORD
            store(digit, load(digit) + 1)
            store(others + new, load(keys + row))
            store(spare + new, load(places + row))
        keys, others = others, keys
        places, spare = spare, places
        shift += DIGIT
    store(table + T_KEYS, keys)
    store(table + T_PLACES, places)


def distinct(table):
    """Return how many different numbers there are, in order."""
    keys, found, before = at(table, T_KEYS), int64(0), int64(-1)
    for row in range(0, at(table, T_COUNT) * WORD, WORD):
        found += load(keys + row) != before
        before = load(keys + row)
    return found


def add(total, value, size, single):
    """Add a row of float32, or of float64, to another."""
    if single:
        for place in range(0, size, HALF):
            one, other = as_float32(load_half(total + place)), as_float32(load_half(value + place))
            store_half(total + place, as_uint32(float32(one + other)))
    else:
        for place in range(0, size, WORD):
            ours, theirs = as_float64(uint64(load(total + place))), as_float64(uint64(load(value + place)))
            store(total + place, int64(as_uint64(ours + theirs)))


def copy(target, source, size):
    """Copy a row, of whole halves of words."""
    for place in range(0, size, HALF):
        store_half(target + place, uint32(load_half(source + place)))


def write_row(ours, launch, table, row, key, value):
    """Write where a row stands in each array, after the one before; its number alone tells, for that was verified."""
    dimensions, rows = at(table, T_DIMENSIONS) * WORD, at(launch, L_TENSORS) * WORD
    place = at(launch, L_POINTERS) + row * WORD
    store(place + rows, value)
    array, length = table + T_SIZES + at(ours, O_DIMENSIONS) * WORD, WORD + at(ours, O_DIMENSIONS) * WORD
    for position in range(at(ours, O_ARRAYS)):
        address, rest = load(array), key
        for dimension in range(dimensions, WORD, -WORD):
            size = at(table, T_SIZES + dimension - WORD)
            address += rest % size * load(array + dimension)
            rest //= size
        if dimensions:
            address += rest * load(array + WORD)
        store(place, address)
        array += length
        place += rows if position else 2 * rows  # the second one is the gradient
    store(at(ours, O_OWNER) + row * WORD, at(table, T_NUMBER))
    store(at(launch, L_COEFFICIENT_ROW) + row * WORD, at(table, T_COEFFICIENT_ROW))


def write_segments(launch, row, elements, segments, item, done, most):
    """Cut a row into segments after those there are; return how many there are then, the item, the elements."""
    for start in range(0, elements, CHUNK):
        size = min(CHUNK, elements - start)
        store(at(launch, L_SEGMENT_TENSOR) + segments * WORD, row)
        store(at(launch, L_SEGMENT_START) + segments * WORD, start)
        store(at(launch, L_SEGMENT_SIZE) + segments * WORD, size)
        if done // most != item:
            item = done // most
            items = at(launch, L_WORK_ITEMS) + 1
            store(launch + L_WORK_ITEMS, items)
            store(at(launch, L_FIRST_SEGMENT) + (items - 1) * WORD, segments)
        segments += 1
        done += size
    return segments, item, done


def write_tables(ours, launch, total):
    """Write the launch."""
    most = min(max(CHUNK, total // FEWEST_ITEMS), LARGEST_ITEM)
    row, segments, item, done, sums = int64(0), int64(0), int64(-1), int64(0), at(ours, O_SUMS)
    store(launch + L_WORK_ITEMS, 0)
    for number in range(at(ours, O_COUNT)):
        table = at(ours, O_TABLES) + number * at(ours, O_TABLE_SIZE)
        keys, places, size, values = (
            at(table, T_KEYS),
            at(table, T_PLACES),
            at(table, T_BYTES),
            load(at(table, T_VALUES)),
        )
        first, end = int64(0), at(table, T_COUNT) * WORD
        while first < end:
            key, value, later = load(keys + first), values + load(places + first) * size, first + WORD
            while later < end and load(keys + later) == key:
                if later == first + WORD:
                    copy(sums, value, size)
                    value = sums
                    sums += size
                add(value, values + load(places + later) * size, size, at(ours, O_KIND) == SINGLE)
                later += WORD
            write_row(ours, launch, table, row, key, value)
            segments, item, done = write_segments(launch, row, at(table, T_ELEMENTS), segments, item, done, most)
            row += 1
            first = later
    store(launch + L_SEGMENTS, segments)
    store(at(launch, L_FIRST_SEGMENT) + at(launch, L_WORK_ITEMS) * WORD, segments)


def kernel(ours):
    """Write a launch of the rows of tables.

    The status, which ends a sequence of launches, is -1 if an index is outside, -2 if there are repeated rows of values
    that are not added up here; then nothing is written.
    """
    launch, scratch, counts, repeated = at(ours, O_LAUNCH), at(ours, O_SCRATCH), at(ours, O_COUNTS), False
    rows, total = int64(0), int64(0)
    for number in range(at(ours, O_COUNT)):
        table = at(ours, O_TABLES) + number * at(ours, O_TABLE_SIZE)
        size = at(table, T_COUNT) * WORD
        store(table + T_KEYS, scratch)
        store(table + T_PLACES, scratch + size)
        largest = read_keys(table, scratch, scratch + size)
        if largest == OUTSIDE:
            store(ours + O_STATUS, -1)
            return
        if largest != ASCENDING:
            sort(table, scratch, scratch + size, scratch + 2 * size, counts, largest)
        found = distinct(table)
        repeated |= found < at(table, T_COUNT)
        rows += found
        total += found * at(table, T_ELEMENTS)
        scratch += 4 * size
    if repeated and at(ours, O_KIND) == OTHER:
        store(ours + O_STATUS, -2)
        return
    store(launch + L_TENSORS, rows)
    write_tables(ours, launch, total)
