"""Compiled look at many tensors at once, at the places that `anatomy` has found.

Not imported: `tensors` compiles this file's text as it does kernels, which it also resembles.  What is known of a
tensor is a record of int64: address of its memory; where it, its implementation, and its storage are; the memory's
address and owner as the storage has them; the words of the implementation that describe it; then, for those that are
described by other words, dimensions, kind, dtype, sizes, strides.
"""

from numba import carray, cfunc, float32, float64, int64, njit, types, uint32

from surefoot.engines.cpu.intrinsics import call, count, lookup, pointer, prefetch, walk

TENSOR, IMPLEMENTATION, STORAGE, MEMORY, DESCRIPTION, FACTS = 1, 2, 3, 4, 7, 24
SIZES, DIMENSIONS, INLINE = FACTS + 3, 8, 5
RECORD = SIZES + 2 * DIMENSIONS + 5
ANATOMY, QUESTIONS = 8 * 8, 19 * 8  # places in a job, in bytes
JOB = 29
AHEAD, LINE = 8, 64  # how many positions before it is looked at a tensor is fetched, and bytes that are fetched at once


@njit(error_model="numpy")
def words(address, count):
    """Give the memory at an address as words."""
    return carray(pointer(address, int64(0)), count)


@njit(error_model="numpy")
def ask(question, tensor, answer):
    """Give what one of torch's functions answers; an answer of fewer bytes than a word is padded with zeros."""
    words(answer, 1)[0] = 0
    call(question, tensor, answer)
    return words(answer, 1)[0]


@njit(error_model="numpy")
def differs(tensor, record, job):
    """Compare a tensor with its record, but for where it is, and bring the record up to date."""
    anatomy = words(job + ANATOMY, 11)
    implementation = words(tensor, 1)[0]
    storage = words(implementation + anatomy[9], 1)[0]
    description = words(implementation + anatomy[1], anatomy[7])
    same = record[FACTS] <= INLINE
    for word in range(anatomy[7]):
        same &= description[word] == record[DESCRIPTION + word]
    if same & (storage == record[STORAGE]) & (storage != 0):
        memory = words(storage + anatomy[10], 3)
        if (memory[0] == record[MEMORY]) & (memory[1] == record[MEMORY + 1]) & (memory[2] == record[MEMORY + 2]):
            return False
    record[0] = ask(words(job + QUESTIONS, 5)[0], tensor, words(job, 8)[7])
    record[TENSOR], record[IMPLEMENTATION], record[STORAGE] = tensor, implementation, storage
    if storage:
        memory = words(storage + anatomy[10], 3)
        for word in range(3):
            record[MEMORY + word] = memory[word]
    return not same and described_otherwise(tensor, record, job)


@njit(error_model="numpy")
def described_otherwise(tensor, record, job):
    """Compare what a tensor is like with its record, whatever words describe it, and bring the record up to date."""
    anatomy, questions, answer = words(job + ANATOMY, 11), words(job + QUESTIONS, 5), words(job, 8)[7]
    implementation = words(tensor, 1)[0]
    description = words(implementation + anatomy[1], anatomy[7])
    for word in range(anatomy[7]):
        record[DESCRIPTION + word] = description[word]
    kind, dtype = words(implementation + anatomy[2], 1)[0], ask(questions[1], tensor, answer)
    dimensions = ask(questions[2], tensor, answer)
    facts = record[FACTS:]
    changed = (facts[0] != dimensions) | (dimensions > DIMENSIONS) | (facts[1] != kind) | (facts[2] != dtype)
    facts[0], facts[1], facts[2] = dimensions, kind, dtype
    sizes, strides = answer, answer
    if dimensions:
        sizes, strides = ask(questions[3], tensor, answer), ask(questions[4], tensor, answer)
    for dimension in range(min(dimensions, DIMENSIONS)):
        size, stride = words(sizes, DIMENSIONS)[dimension], words(strides, DIMENSIONS)[dimension]
        changed |= (record[SIZES + 2 * dimension] != size) | (record[SIZES + 2 * dimension + 1] != stride)
        record[SIZES + 2 * dimension], record[SIZES + 2 * dimension + 1] = size, stride
    return changed


@njit(error_model="numpy")
def moved(tensor, record, job):
    """Whether a tensor differs from its record, the address included."""
    before = record[0]
    return differs(tensor, record, job) | (record[0] != before)


@njit(error_model="numpy")
def fetch(records, count, data):
    """Begin to load the tensors of some records from where they were last, for most are not in a cache any more."""
    for index in range(count):
        record = words(records + index * (RECORD * 8), FACTS)
        prefetch(record[TENSOR])
        for line in range(3):
            prefetch(record[IMPLEMENTATION] + line * LINE)
        prefetch(record[STORAGE] + data)


@njit(error_model="numpy")
def changes(job):
    """Count what has changed about parameters, gradients and the entries of their state; hold the gradients."""
    slots, anatomy = words(job, JOB), words(job + ANATOMY, 11)
    tensors, entries, changed = slots[1], slots[2], 0
    objects = words(slots[3], (1 + entries) * tensors)
    states, names = words(slots[4], tensors), words(slots[5], entries)
    row = (2 + entries) * (RECORD * 8)
    for index in range(tensors):
        record = slots[6] + index * row
        if index + AHEAD < tensors:
            fetch(record + AHEAD * row, 2 + entries, anatomy[10])
            prefetch(states[index + AHEAD])
        tensor = objects[index] + anatomy[0]
        changed += moved(tensor, words(record, RECORD), job)
        if slots[28]:
            metadata = words(words(tensor, 1)[0] + anatomy[3], 1)[0]
            gradient = metadata + anatomy[6]
            if metadata == 0 or words(gradient, 1)[0] == anatomy[8]:
                return changed + 1
            held, found = slots[28] + index * 8, words(record + RECORD * 8, RECORD)
            call(slots[26], gradient, held)
            changed += differs(held, found, job)
            found[TENSOR] = gradient
        for entry in range(entries):
            expected = objects[(1 + entry) * tensors + index]
            if slots[5] and lookup(slots[24], states[index], names[entry]) != expected:
                return changed + 1
            changed += moved(expected + anatomy[0], words(record + (2 + entry) * (RECORD * 8), RECORD), job)
    return changed


@njit(error_model="numpy")
def other_items(slots):
    """Count the items in which dicts differ from the pairs they had, in order, and the dicts that were replaced."""
    dicts, sizes, pairs = words(slots[3], slots[1]), words(slots[4], slots[1]), slots[5]
    owners, answer, differing = words(slots[6], 2 * slots[1]), slots[7], 0
    position = words(answer, 3)
    for index in range(slots[1]):
        if owners[2 * index] and lookup(slots[24], owners[2 * index], owners[2 * index + 1]) != dicts[index]:
            return differing + 1
        expected, found = words(pairs, 2 * sizes[index]), 0
        position[0] = 0
        while walk(slots[25], dicts[index], answer, answer + 8, answer + 16):
            if found < sizes[index]:
                differing += (position[1] != expected[2 * found]) | (position[2] != expected[2 * found + 1])
            found += 1
        differing += abs(found - sizes[index])
        pairs += sizes[index] * 16
    return differing


@njit(error_model="numpy")
def copy_numbers(slots, reading):
    """Copy numbers of float64, or as the entry of `wide` says float32, between their places and a row."""
    addresses, wide, values = words(slots[3], slots[1]), words(slots[4], slots[1]), slots[5]
    for index in range(slots[1]):
        address, number = addresses[index], carray(pointer(values + index * 8, float64(0)), 1)
        if wide[index] and reading:
            number[0] = carray(pointer(address, float64(0)), 1)[0]
        elif wide[index]:
            carray(pointer(address, float64(0)), 1)[0] = number[0]
        elif reading:
            number[0] = carray(pointer(address, float32(0)), 1)[0]
        else:
            carray(pointer(address, float32(0)), 1)[0] = float32(number[0])


@njit(error_model="numpy")
def count_versions(job):
    """Tell autograd that tensors have been written; where the second slot is set, give their versions instead."""
    slots, anatomy = words(job, JOB), words(job + ANATOMY, 11)
    objects = words(slots[3], slots[1])
    for index in range(slots[1]):
        counter = words(words(objects[index] + anatomy[0], 1)[0] + anatomy[4], 1)[0]
        if counter and slots[2]:
            words(slots[4], slots[1])[index] = carray(pointer(counter + anatomy[5], uint32(0)), 1)[0]
        elif counter:
            count(counter + anatomy[5])


@njit(error_model="numpy")
def let_go(slots):
    """Let what holds gradients refer to nothing, as the last of them always does."""
    count = slots[1]
    held = words(slots[28], count + 1)
    for index in range(count):
        if held[index] != held[count]:
            call(slots[26], slots[28] + count * 8, slots[28] + index * 8)


@cfunc(types.void(types.int64), error_model="numpy")
def kernel(job):
    """Do what the first slot says: 1 changes, 2 other items, 3 read and 4 write numbers, 5 count versions, 6 let go."""
    slots = words(job, JOB)
    if slots[0] == 1:
        slots[27] = changes(job)
    elif slots[0] == 2:
        slots[27] = other_items(slots)
    elif slots[0] == 5:
        count_versions(job)
    elif slots[0] == 6:
        let_go(slots)
    else:
        copy_numbers(slots, slots[0] == 3)
