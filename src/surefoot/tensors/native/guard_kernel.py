"""The guard kernel: a compiled look at many tensors at once, at the places that `layout` has found.

Not imported: `guards` compiles this file's text as it does kernels, after a line that defines PLACES.  Everything is
an address or a word of 8 bytes.

What is known of a tensor is a record of words: address of its memory; where it, its implementation, and its storage
are; the memory's address, owner and size as the storage has them; the bytes from the tensor's address to the end of
its last element; the words of the implementation that describe it.  Those that are described by other words are
compared by facts: dimensions, kind, dtype, sizes, strides.
"""

FEW_PASSES = True

# Places in bytes, constants of the compiled code, in the order of `guards`.
(
    A_TENSOR, A_STORAGE, A_DATA, A_DELETER, A_DESCRIPTION, A_KIND, A_AUTOGRAD, A_VERSION, A_COUNT, A_GRAD, DESCRIBED,
    A_SIZE,
) = PLACES  # fmt: skip

WORD, LINE = 8, 64  # bytes
TENSOR, IMPLEMENTATION, STORAGE, MEMORY, SIZE, SPANNED, DESCRIPTION, RECORD = (
    n * WORD for n in (1, 2, 3, 4, 7, 8, 9, 24)
)
KIND, DTYPE, SIZES, FACTS = (n * WORD for n in (1, 2, 3, 24))  # the last word of facts is for answers
DIMENSIONS, INLINE = 8, 5
VECTOR = 8  # words that are compared at a time
BLOCK = 128 * WORD  # positions that a thread takes at a time
AHEAD = 8 * WORD  # how many positions before it is looked at a tensor is fetched
KEYS = 4 * WORD  # where a dict may have the address of its table, which is fetched too

STATUS = WORD  # where every kernel tells that an error has stopped it

# What the kernel is handed: the task, its status, of how many, what each task needs, functions, and what threads share.
COUNT, SECOND, OBJECTS, THIRD, NAMES, RECORDS, ANSWER, HELD, UNDEFINED = (n * WORD for n in range(2, 11))
GET_DATA, GET_DTYPE, GET_DIM, GET_SIZES, GET_STRIDES, ASSIGN, LOOKUP, WALK, THREAD, NEXT, LATER, RESULT = (
    n * WORD for n in range(11, 23)
)
WRITTEN, SHIFT, LIST_SIZE, LIST_ITEM, GIVEN, OTHER, MOVED = (n * WORD for n in range(23, 30))
LOW, HIGH, ENTRY = (n * WORD for n in (1, 2, 3))  # of the table of storages that a step writes: base, and how far


def call_getter(function, tensor, answer):
    """Call `int32 (*)(void* tensor, void* answer)` and return the word at `answer`, zero where nothing is written."""
    store(answer, 0)
    call(int32, function, tensor, answer)
    return load(answer)


def dict_lookup(function, mapping, key):
    """Call `PyObject* (*)(PyObject* mapping, PyObject* key)`."""
    return call(int64, function, mapping, key)


def differs(launch, tensor, record, facts):
    """Compare a tensor with what is known of it, but for where it is, and bring that up to date."""
    implementation = load(tensor)
    storage, described = load(implementation + A_STORAGE), True
    description = implementation + A_DESCRIPTION
    for word in range(0, DESCRIBED - VECTOR, VECTOR):
        described &= equal_words(description + word * WORD, record + DESCRIPTION + word * WORD)
    last = (DESCRIBED - VECTOR) * WORD
    described &= equal_words(description + last, record + DESCRIPTION + last)
    memory = storage + A_DATA
    if described & (storage != 0) & (storage == load(record + STORAGE)):
        here = load(memory) == load(record + MEMORY)
        here &= load(memory + WORD) == load(record + MEMORY + WORD)
        here &= load(memory + 2 * WORD) == load(record + MEMORY + 2 * WORD)
        here &= load(memory + A_SIZE) == load(record + SIZE)
        if here:
            return False
    if storage == 0 or load(implementation + A_KIND) != load(facts + KIND) != 0:
        return True  # of another kind nothing may be asked: Python might answer, and another thread has the interpreter
    # A lazy clone is owned otherwise.  Asked for its memory it makes its own, which two threads must not do at once.
    if load(launch + THREAD) and load(memory + A_DELETER) != load(record + MEMORY + A_DELETER):
        store(launch + LATER, 1)
        return False
    before = load(record)
    store(record, call_getter(load(launch + GET_DATA), tensor, facts + FACTS - WORD))
    for word in range(0, 3 * WORD, WORD):
        store(record + MEMORY + word, load(memory + word))
    store(record + SIZE, load(memory + A_SIZE))
    store(record + TENSOR, tensor)
    store(record + IMPLEMENTATION, implementation)
    described &= load(facts) <= INLINE
    changed = not described and described_otherwise(launch, tensor, record, facts)
    changed |= load(record) == 0 != before  # a storage without memory
    changed |= load(record) + load(record + SPANNED) > load(memory) + load(memory + A_SIZE)  # or with too little
    store(record + STORAGE, storage if load(facts) <= INLINE else 0)
    return changed


def described_otherwise(launch, tensor, record, facts):
    """Compare what a tensor is like with what is known, whatever words describe it, and bring that up to date."""
    implementation, answer = load(tensor), facts + FACTS - WORD
    for word in range(0, DESCRIBED * WORD, WORD):
        store(record + DESCRIPTION + word, load(implementation + A_DESCRIPTION + word))
    kind, dtype = load(implementation + A_KIND), call_getter(load(launch + GET_DTYPE), tensor, answer)
    dimensions = call_getter(load(launch + GET_DIM), tensor, answer)
    changed = (load(facts) != dimensions) | (dimensions > DIMENSIONS)
    changed |= (load(facts + KIND) != kind) | (load(facts + DTYPE) != dtype)
    store(facts, dimensions)
    store(facts + KIND, kind)
    store(facts + DTYPE, dtype)
    sizes = strides = int64(0)
    if dimensions:
        sizes = call_getter(load(launch + GET_SIZES), tensor, answer)
        strides = call_getter(load(launch + GET_STRIDES), tensor, answer)
        if sizes == 0 or strides == 0:
            return True
    place = facts + SIZES
    for dimension in range(0, DIMENSIONS * WORD, WORD):
        if dimension >= dimensions * WORD:
            break
        size, stride = load(sizes + dimension), load(strides + dimension)
        changed |= (load(place) != size) | (load(place + WORD) != stride)
        store(place, size)
        store(place + WORD, stride)
        place += 2 * WORD
    return changed


def fetch(record, columns):
    """Begin to load the tensors of some records from where they were last, for most are not in a cache any more."""
    for _ in range(columns):
        prefetch(load(record + TENSOR))
        for line in range(0, 3 * LINE, LINE):
            prefetch(load(record + IMPLEMENTATION) + line)
        prefetch(load(record + STORAGE) + A_DATA)
        prefetch(load(record + STORAGE) + A_DATA + A_SIZE)
        record += RECORD


def entry_of(launch, base):
    """Return where a storage stands in the hash table of those that the step writes, or where there is room for it."""
    hashed = uint64(base) * uint64(0x9E3779B97F4A7C15) >> uint64(load(launch + SHIFT))
    entry = load(launch + WRITTEN) + int64(hashed) * ENTRY
    while load(entry) != 0:
        if load(entry) == base:
            return entry
        entry += ENTRY
    return entry


def is_written(launch, base):
    """Return whether the memory at an address is one that the step writes."""
    return load(launch + WRITTEN) != 0 and base != 0 and load(entry_of(launch, base)) == base


def enter_written(launch):
    """Enter all columns but gradients into the table of what is written; return whether some of them may overlap."""
    columns, overlap = 2 + load(launch + SECOND), 0
    for position in range(load(launch + COUNT) * columns):
        record = load(launch + RECORDS) + position * RECORD
        base, low, size = load(record + MEMORY), load(record), load(record + SPANNED)
        if position % columns != 1 and base != 0 and size != 0:
            entry, high = entry_of(launch, base), low + size
            if load(entry) == 0:
                store(entry, base)
                store(entry + LOW, low)
                store(entry + HIGH, high)
            elif load(entry + HIGH) <= low:
                store(entry + HIGH, high)
            elif high <= load(entry + LOW):
                store(entry + LOW, low)
            else:
                store(entry + LOW, min(low, load(entry + LOW)))
                store(entry + HIGH, max(high, load(entry + HIGH)))
                overlap = 1
    return overlap


def gradients_meet_written(launch):
    """Return whether a gradient may overlap with what is written."""
    columns = 2 + load(launch + SECOND)
    for position in range(1, load(launch + COUNT) * columns, columns):
        record = load(launch + RECORDS) + position * RECORD
        if is_written(launch, load(record + MEMORY)):
            entry, low = entry_of(launch, load(record + MEMORY)), load(record)
            if low < load(entry + HIGH) and load(entry + LOW) < low + load(record + SPANNED):
                return 1
    return 0


def changes(launch, start, end):
    """Look for changes of parameters, gradients and other columns at some positions, and hold the gradients.

    What has become another tensor is told apart from what has only moved: it is elsewhere, or a gradient is where the
    step wrote when the guard was made.  A gradient that is not there is neither.
    """
    not_inlined()
    tensors, entries, objects = load(launch + COUNT) * WORD, load(launch + SECOND), load(launch + OBJECTS)
    changed = moved = False
    for index in range(start, end, WORD):
        position = index // WORD * (2 + entries)
        record, facts = load(launch + RECORDS) + position * RECORD, load(launch + ANSWER) + position * FACTS
        if index + AHEAD < end:
            fetch(record + AHEAD // WORD * (2 + entries) * RECORD, 2 + entries)
        for column in range(1 + entries):
            tensor = load(objects + column * tensors + index) + A_TENSOR
            base, address = load(record + MEMORY), load(record)
            changed |= differs(launch, tensor, record, facts)
            moved |= (load(record + MEMORY) != base) | (load(record) != address)
            record += RECORD
            facts += FACTS
            if column == 0:
                if load(launch + HELD) or load(launch + GIVEN):
                    if load(launch + GIVEN):
                        gradient = load(load(launch + GIVEN) + index) + A_TENSOR
                        held = gradient
                    else:
                        metadata = load(load(tensor) + A_AUTOGRAD)
                        gradient, held = metadata + A_GRAD, load(launch + HELD) + index
                        if metadata == 0 or load(gradient) == load(launch + UNDEFINED):
                            note_changes(launch, changed, moved)
                            return True
                        call(int32, load(launch + ASSIGN), gradient, held)
                    base, address = load(record + MEMORY), load(record)
                    changed |= differs(launch, held, record, facts)
                    if load(record + MEMORY) != base or load(record) != address:
                        moved |= is_written(launch, load(record + MEMORY))
                    store(record + TENSOR, gradient)
                record += RECORD
                facts += FACTS
    note_changes(launch, changed, moved)
    return changed | moved


def note_changes(launch, changed, moved):
    """Note, until somebody takes it back, what has been found."""
    if changed:
        store(launch + OTHER, 1)
    if moved:
        store(launch + MOVED, 1)


def entries_replaced(launch):
    """Return whether an entry of state is not the tensor that it was.  Only who holds the interpreter may ask."""
    tensors = load(launch + COUNT) * WORD
    for index in range(0, tensors, WORD):
        state = load(load(launch + THIRD) + index)
        if index + 2 * AHEAD < tensors:
            prefetch(load(load(launch + THIRD) + index + 2 * AHEAD))
            table = load(load(load(launch + THIRD) + index + AHEAD) + KEYS)
            for line in range(0, 3 * LINE, LINE):
                prefetch(table + line)
        for column in range(load(launch + SECOND)):
            entry = load(load(launch + OBJECTS) + (1 + column) * tensors + index)
            if dict_lookup(load(launch + LOOKUP), state, load(load(launch + NAMES) + column * WORD)) != entry:
                return True
    return False


def look(launch):
    """Look for changes of everything; each thread takes the positions that no other has.

    What only one thread may look at is left for a later look, of one.  A change that was noted is found again.
    """
    if load(launch + OTHER) or load(launch + MOVED):
        store(launch + RESULT, 1)
        return
    if (
        load(launch + NAMES)
        and (load(launch + THREAD) == 0 or call(int32, load(launch + THREAD)) == 0)
        and entries_replaced(launch)
    ):
        store(launch + OTHER, 1)
        store(launch + RESULT, 1)
    start, end = atomic_increment(launch + NEXT) * BLOCK, load(launch + COUNT) * WORD
    while start < end:
        if changes(launch, start, min(start + BLOCK, end)):
            store(launch + RESULT, 1)
        start = atomic_increment(launch + NEXT) * BLOCK


def other_items(launch):
    """Count the items in which dicts differ from the pairs they had, in order, and the dicts that were replaced.

    It notes how many values have been replaced, and of each where its pair stands.
    """
    differing, pair, position, noted = 0, load(launch + NAMES), load(launch + ANSWER), load(launch + HELD)
    store(noted, 0)
    for index in range(0, load(launch + COUNT) * WORD, WORD):
        mapping, owner = load(load(launch + OBJECTS) + index), load(launch + RECORDS) + 2 * index
        if load(owner) and dict_lookup(load(launch + LOOKUP), load(owner), load(owner + WORD)) != mapping:
            return differing + 1
        size, found = load(load(launch + THIRD) + index), 0
        store(position, 0)
        while call(int32, load(launch + WALK), mapping, position, position + WORD, position + 2 * WORD):
            if found < size:
                differing += load(position + WORD) != load(pair + found * 2 * WORD)
                if load(position + 2 * WORD) != load(pair + found * 2 * WORD + WORD):
                    differing += 1
                    store(noted, load(noted) + 1)
                    store(noted + load(noted) * WORD, pair + found * 2 * WORD - load(launch + NAMES))
            found += 1
        differing += abs(found - size)
        pair += size * 2 * WORD
    return differing


def copy_numbers(launch, reading):
    """Copy numbers of float64, or as the entry of `wide` says float32, between their places and a row."""
    places, value, end = load(launch + OBJECTS), load(launch + NAMES), load(launch + COUNT) * WORD
    for index in range(0, end, WORD):
        place, wide = load(places + index), load(load(launch + THIRD) + index)
        if index + AHEAD < end:
            prefetch(load(places + index + AHEAD))
        if wide and reading:
            store(value, load(place))
        elif wide:
            store(place, load(value))
        elif reading:
            store(value, int64(as_uint64(float64(as_float32(load_half(place))))))
        else:
            store_half(place, as_uint32(float32(as_float64(uint64(load(value))))))
        value += WORD


def read_shared_numbers(launch):
    """Read numbers, and note whether one is not like that which is to stand for it."""
    copy_numbers(launch, True)
    values, place, differ = load(launch + NAMES), load(launch + RECORDS), False
    for index in range(0, load(launch + COUNT) * WORD, WORD):
        differ |= load(values + index) != load(values + load(place + index) * WORD)
    store(launch + OTHER, int64(differ))


def write_shared_numbers(launch):
    """Write numbers, each as that which stands for it."""
    values, place = load(launch + NAMES), load(launch + RECORDS)
    for index in range(0, load(launch + COUNT) * WORD, WORD):
        store(values + index, load(values + load(place + index) * WORD))
    copy_numbers(launch, False)


def other_lists(launch):
    """Return whether one of some lists has other items than it had."""
    expected = load(launch + NAMES)
    for index in range(0, load(launch + COUNT) * WORD, WORD):
        items, size = load(load(launch + OBJECTS) + index), load(load(launch + THIRD) + index)
        if call(int64, load(launch + LIST_SIZE), items) != size:
            return 1
        for position in range(size):
            if call(int64, load(launch + LIST_ITEM), items, position) != load(expected):
                return 1
            expected += WORD
    return 0


def has_gradient(launch):
    """Return whether one of some tensors has a gradient."""
    for index in range(0, load(launch + COUNT) * WORD, WORD):
        metadata = load(load(load(load(launch + OBJECTS) + index) + A_TENSOR) + A_AUTOGRAD)
        if metadata and load(metadata + A_GRAD) != load(launch + UNDEFINED):
            return 1
    return 0


def count_versions(launch):
    """Tell autograd that tensors have been written; where the second slot is set, give their versions instead."""
    objects, end = load(launch + OBJECTS), load(launch + COUNT) * WORD
    for index in range(0, end, WORD):
        if index + 3 * AHEAD < end:
            prefetch(load(objects + index + 3 * AHEAD) + A_TENSOR)
            prefetch(load(load(objects + index + 2 * AHEAD) + A_TENSOR) + A_VERSION)
            prefetch(load(load(load(objects + index + AHEAD) + A_TENSOR) + A_VERSION) + A_COUNT)
        counter = load(load(load(objects + index) + A_TENSOR) + A_VERSION)
        if counter and load(launch + SECOND):
            store(load(launch + THIRD) + index, int64(load_half(counter + A_COUNT)))
        elif counter:
            atomic_increment_32(counter + A_COUNT)


def release_grads(launch):
    """Let what holds gradients refer to nothing, as the last of them always does."""
    held = load(launch + HELD)
    nothing = held + load(launch + COUNT) * WORD
    for place in range(held, nothing, WORD):
        if place + AHEAD < nothing:
            prefetch(load(place + AHEAD) + WORD)
        if load(place) != load(nothing):
            call(int32, load(launch + ASSIGN), nothing, place)


def perform_more(launch, task):
    """Do what seldom has to be done."""
    not_inlined()
    if task == 12:
        store(launch + RESULT, enter_written(launch))
    elif task == 13:
        store(launch + RESULT, gradients_meet_written(launch))
    elif load(launch + NAMES):
        store(launch + RESULT, int64(entries_replaced(launch)))


def perform(launch):
    """Do one task, that which the first slot says; sequences are `kernel`'s."""
    not_inlined()  # into the loop of a sequence: it takes LLVM half the time
    task = load(launch)
    if task == 1:
        look(launch)
    elif task == 2:
        store(launch + RESULT, other_items(launch))
    elif task == 5:
        count_versions(launch)
    elif task == 6:
        release_grads(launch)
    elif task == 8:
        read_shared_numbers(launch)
    elif task == 9:
        write_shared_numbers(launch)
    elif task == 10:
        store(launch + RESULT, other_lists(launch))
    elif task == 11:
        store(launch + RESULT, has_gradient(launch))
    elif task >= 12:
        perform_more(launch, task)
    else:
        copy_numbers(launch, task == 3)


def kernel(launch):
    """Do what the first slot says.

    1 changes, 2 other items, 3 read and 4 write numbers, 5 count versions, 6 release gradients, 7 in sequence, 8 read
    and 9 write shared numbers, 10 other lists, 11 has a gradient, 12 enter what is written, 13 gradients meet that,
    14 entries replaced.  Several threads may look for changes at once.  A sequence is tasks of this kernel and launches
    of others, one after the other up to the first that finds something; the result is its number, from 1, or 0.
    """
    several = load(launch) == 7
    entry, count = load(launch + OBJECTS), load(launch + COUNT) if several else 1
    for position in range(1, count + 1):
        other, kernel_address = launch, int64(0)
        if several:
            kernel_address, other = load(entry), load(entry + WORD)
            entry += 2 * WORD
        if kernel_address:
            store(other, 0)  # the next work item
            call(None, kernel_address, other)
            found = load(other + STATUS)
        else:
            if several:
                store(other + THREAD, 0)
                store(other + NEXT, 0)
                store(other + RESULT, 0)
            perform(other)
            found = load(other + RESULT)
        if several and found:
            store(launch + RESULT, position)
            return
    if several:
        store(launch + RESULT, 0)
