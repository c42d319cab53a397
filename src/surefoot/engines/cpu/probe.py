"""Compiled look at many tensors at once, at the places that `anatomy` has found.

Not imported: `tensors` compiles this file's text as it does kernels.  Everything is an address or a word of 8 bytes:
arrays would take Numba seconds to compile.

What is known of a tensor is a record of words: address of its memory; where it, its implementation, and its storage
are; the memory's address and owner as the storage has them; the words of the implementation that describe it; then, for
those that are described by other words, dimensions, kind, dtype, sizes, strides.
"""

from numba import cfunc, float32, float64, int64, njit, types, uint64

from surefoot.engines.cpu.intrinsics import (
    as_float32,
    as_float64,
    as_uint32,
    as_uint64,
    ask,
    call,
    count,
    load,
    load_half,
    lookup,
    prefetch,
    store,
    store_half,
    walk,
)

WORD, LINE = 8, 64  # bytes
TENSOR, IMPLEMENTATION, STORAGE, MEMORY, DESCRIPTION, FACTS, RECORD = (n * WORD for n in (1, 2, 3, 4, 7, 24, 48))
KIND, DTYPE, SIZES = FACTS + WORD, FACTS + 2 * WORD, FACTS + 3 * WORD
DIMENSIONS, INLINE = 8, 5
AHEAD = 8  # how many positions before it is looked at a tensor is fetched

# A job: what is asked, of how many, and what each task needs; then the places, in the order of `tensors`.
COUNT, SECOND, OBJECTS, THIRD, NAMES, RECORDS, ANSWER = (n * WORD for n in range(1, 8))
A_TENSOR, A_DESCRIPTION, A_KIND, A_AUTOGRAD, A_VERSION, A_COUNT, A_GRAD, DESCRIBED, UNDEFINED, A_STORAGE, A_DATA = (
    n * WORD for n in range(8, 19)
)
GET_DATA, GET_DTYPE, GET_DIM, GET_SIZES, GET_STRIDES, LOOKUP, WALK, ASSIGN, RESULT, HELD = (
    n * WORD for n in range(19, 29)
)


@njit
def differs(job, tensor, record):
    """Compare a tensor with its record, but for where it is, and bring the record up to date."""
    implementation = load(tensor)
    storage = load(implementation + load(job + A_STORAGE))
    description = implementation + load(job + A_DESCRIPTION)
    same = load(record + FACTS) <= INLINE
    for word in range(0, load(job + DESCRIBED) * WORD, WORD):
        same &= load(description + word) == load(record + DESCRIPTION + word)
    here = same & (storage == load(record + STORAGE)) & (storage != 0)
    if here:
        for word in range(0, 3 * WORD, WORD):
            here &= load(storage + load(job + A_DATA) + word) == load(record + MEMORY + word)
        if here:
            return False
    answer = load(job + ANSWER)
    store(record, ask(load(job + GET_DATA), tensor, answer))
    store(record + TENSOR, tensor)
    store(record + IMPLEMENTATION, implementation)
    store(record + STORAGE, storage)
    if storage:
        for word in range(0, 3 * WORD, WORD):
            store(record + MEMORY + word, load(storage + load(job + A_DATA) + word))
    return not same and described_otherwise(job, tensor, record)


@njit
def described_otherwise(job, tensor, record):
    """Compare what a tensor is like with its record, whatever words describe it, and bring the record up to date."""
    implementation = load(tensor)
    for word in range(0, load(job + DESCRIBED) * WORD, WORD):
        store(record + DESCRIPTION + word, load(implementation + load(job + A_DESCRIPTION) + word))
    answer = load(job + ANSWER)
    kind, dtype = load(implementation + load(job + A_KIND)), ask(load(job + GET_DTYPE), tensor, answer)
    dimensions = ask(load(job + GET_DIM), tensor, answer)
    changed = (load(record + FACTS) != dimensions) | (dimensions > DIMENSIONS)
    changed |= (load(record + KIND) != kind) | (load(record + DTYPE) != dtype)
    store(record + FACTS, dimensions)
    store(record + KIND, kind)
    store(record + DTYPE, dtype)
    sizes = strides = int64(0)
    if dimensions:
        sizes = ask(load(job + GET_SIZES), tensor, answer)
        strides = ask(load(job + GET_STRIDES), tensor, answer)
    place = record + SIZES
    for dimension in range(0, DIMENSIONS * WORD, WORD):
        if dimension >= dimensions * WORD:
            break
        size, stride = load(sizes + dimension), load(strides + dimension)
        changed |= (load(place) != size) | (load(place + WORD) != stride)
        store(place, size)
        store(place + WORD, stride)
        place += 2 * WORD
    return changed


@njit
def fetch(job, record, columns):
    """Begin to load the tensors of some records from where they were last, for most are not in a cache any more."""
    for _ in range(columns):
        prefetch(load(record + TENSOR))
        for line in range(0, 3 * LINE, LINE):
            prefetch(load(record + IMPLEMENTATION) + line)
        prefetch(load(record + STORAGE) + load(job + A_DATA))
        record += RECORD


@njit
def changes(job):
    """Count what has changed about parameters, gradients and the entries of their state; hold the gradients."""
    tensors, entries, objects = load(job + COUNT), load(job + SECOND), load(job + OBJECTS)
    record, changed = load(job + RECORDS), 0
    for index in range(0, tensors * WORD, WORD):
        if index + AHEAD * WORD < tensors * WORD:
            fetch(job, record + AHEAD * (2 + entries) * RECORD, 2 + entries)
            prefetch(load(load(job + THIRD) + index + AHEAD * WORD))
        for column in range(1 + entries):
            tensor = load(objects + column * tensors * WORD + index)
            if column and load(job + NAMES):
                state, name = load(load(job + THIRD) + index), load(load(job + NAMES) + (column - 1) * WORD)
                if lookup(load(job + LOOKUP), state, name) != tensor:
                    return changed + 1
            tensor += load(job + A_TENSOR)
            before = load(record)
            changed += differs(job, tensor, record) | (load(record) != before)
            record += RECORD
            if column == 0:
                if load(job + HELD):
                    metadata = load(load(tensor) + load(job + A_AUTOGRAD))
                    gradient, held = metadata + load(job + A_GRAD), load(job + HELD) + index
                    if metadata == 0 or load(gradient) == load(job + UNDEFINED):
                        return changed + 1
                    call(load(job + ASSIGN), gradient, held)
                    changed += differs(job, held, record)
                    store(record + TENSOR, gradient)
                record += RECORD
    return changed


@njit
def other_items(job):
    """Count the items in which dicts differ from the pairs they had, in order, and the dicts that were replaced."""
    differing, pair, position = 0, load(job + NAMES), load(job + ANSWER)
    for index in range(0, load(job + COUNT) * WORD, WORD):
        mapping, owner = load(load(job + OBJECTS) + index), load(job + RECORDS) + 2 * index
        if load(owner) and lookup(load(job + LOOKUP), load(owner), load(owner + WORD)) != mapping:
            return differing + 1
        size, found = load(load(job + THIRD) + index), 0
        store(position, 0)
        while walk(load(job + WALK), mapping, position, position + WORD, position + 2 * WORD):
            if found < size:
                differing += load(position + WORD) != load(pair + found * 2 * WORD)
                differing += load(position + 2 * WORD) != load(pair + found * 2 * WORD + WORD)
            found += 1
        differing += abs(found - size)
        pair += size * 2 * WORD
    return differing


@njit
def copy_numbers(job, reading):
    """Copy numbers of float64, or as the entry of `wide` says float32, between their places and a row."""
    value = load(job + NAMES)
    for index in range(0, load(job + COUNT) * WORD, WORD):
        number, wide = load(load(job + OBJECTS) + index), load(load(job + THIRD) + index)
        if wide and reading:
            store(value, load(number))
        elif wide:
            store(number, load(value))
        elif reading:
            store(value, int64(as_uint64(float64(as_float32(load_half(number))))))
        else:
            store_half(number, as_uint32(float32(as_float64(uint64(load(value))))))
        value += WORD


@njit
def count_versions(job):
    """Tell autograd that tensors have been written; where the second slot is set, give their versions instead."""
    for index in range(0, load(job + COUNT) * WORD, WORD):
        tensor = load(load(job + OBJECTS) + index) + load(job + A_TENSOR)
        counter = load(load(tensor) + load(job + A_VERSION))
        if counter and load(job + SECOND):
            store(load(job + THIRD) + index, int64(load_half(counter + load(job + A_COUNT))))
        elif counter:
            count(counter + load(job + A_COUNT))


@njit
def let_go(job):
    """Let what holds gradients refer to nothing, as the last of them always does."""
    held = load(job + HELD)
    nothing = held + load(job + COUNT) * WORD
    for place in range(held, nothing, WORD):
        if load(place) != load(nothing):
            call(load(job + ASSIGN), nothing, place)


@cfunc(types.void(types.int64))
def kernel(job):
    """Do what the first slot says: 1 changes, 2 other items, 3 read and 4 write numbers, 5 count versions, 6 let go."""
    task = load(job)
    if task == 1:
        store(job + RESULT, changes(job))
    elif task == 2:
        store(job + RESULT, other_items(job))
    elif task == 5:
        count_versions(job)
    elif task == 6:
        let_go(job)
    else:
        copy_numbers(job, task == 3)
