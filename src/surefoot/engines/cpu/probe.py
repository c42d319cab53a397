"""Compiled look at many tensors at once, at the places that `anatomy` has found.

Not imported: `tensors` compiles this file's text as it does kernels, which it also resembles.  What is known of a
tensor is a record of int64: address, kind, geometry as it lies in memory, dtype, dimensions, sizes, strides.
"""

from numba import carray, cfunc, float32, float64, int64, njit, types, uint32

from surefoot.engines.cpu.intrinsics import call, count, lookup, pointer, walk

GEOMETRY, DIMENSIONS, INLINE = 16, 8, 5
DTYPE = 2 + GEOMETRY
SIZES = DTYPE + 2
RECORD = SIZES + 2 * DIMENSIONS
ANATOMY, QUESTIONS = 8 * 8, 17 * 8  # places in a job, in bytes


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
    """Compare a tensor with its record, but for the address, and bring the record up to date."""
    anatomy, questions, answer = words(job + ANATOMY, 9), words(job + QUESTIONS, 5), words(job, 8)[7]
    implementation = words(tensor, 1)[0]
    record[0] = ask(questions[0], tensor, answer)
    kind = words(implementation + anatomy[2], 1)[0]
    changed = kind != record[1]
    dtype = ask(questions[1], tensor, answer)
    changed |= dtype != record[DTYPE]
    record[1], record[DTYPE] = kind, dtype
    geometry = words(implementation + anatomy[1], anatomy[7])
    same = record[DTYPE + 1] <= INLINE
    for word in range(anatomy[7]):
        same &= geometry[word] == record[2 + word]
    if same:
        return changed
    for word in range(anatomy[7]):
        record[2 + word] = geometry[word]
    dimensions = ask(questions[2], tensor, answer)
    changed |= (dimensions != record[DTYPE + 1]) | (dimensions > DIMENSIONS)
    record[DTYPE + 1] = dimensions
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
def changes(job):
    """Count what has changed about parameters, gradients and the entries of their state."""
    slots, anatomy = words(job, 26), words(job + ANATOMY, 9)
    tensors, entries, changed = slots[1], slots[2], 0
    objects = words(slots[3], (1 + entries) * tensors)
    states, names = words(slots[4], tensors), words(slots[5], entries)
    for index in range(tensors):
        tensor = objects[index] + anatomy[0]
        record = slots[6] + index * (2 + entries) * (RECORD * 8)
        changed += moved(tensor, words(record, RECORD), job)
        if slots[25]:
            metadata = words(words(tensor, 1)[0] + anatomy[3], 1)[0]
            gradient = metadata + anatomy[6]
            if metadata == 0 or words(gradient, 1)[0] == anatomy[8]:
                return changed + 1
            changed += differs(gradient, words(record + RECORD * 8, RECORD), job)
        for entry in range(entries):
            expected = objects[(1 + entry) * tensors + index]
            if slots[5] and lookup(slots[22], states[index], names[entry]) != expected:
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
        if owners[2 * index] and lookup(slots[22], owners[2 * index], owners[2 * index + 1]) != dicts[index]:
            return differing + 1
        expected, found = words(pairs, 2 * sizes[index]), 0
        position[0] = 0
        while walk(slots[23], dicts[index], answer, answer + 8, answer + 16):
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
    slots, anatomy = words(job, 26), words(job + ANATOMY, 9)
    objects = words(slots[3], slots[1])
    for index in range(slots[1]):
        counter = words(words(objects[index] + anatomy[0], 1)[0] + anatomy[4], 1)[0]
        if counter and slots[2]:
            words(slots[4], slots[1])[index] = carray(pointer(counter + anatomy[5], uint32(0)), 1)[0]
        elif counter:
            count(counter + anatomy[5])


@cfunc(types.void(types.int64), error_model="numpy")
def kernel(job):
    """Do what the first slot says: 1 changes, 2 other items, 3 read and 4 write numbers, 5 count versions."""
    slots = words(job, 26)
    if slots[0] == 1:
        slots[24] = changes(job)
    elif slots[0] == 2:
        slots[24] = other_items(slots)
    elif slots[0] == 5:
        count_versions(job)
    else:
        copy_numbers(slots, slots[0] == 3)
