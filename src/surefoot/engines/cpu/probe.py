"""Compiled look at many tensors at once, through the C interface that torch keeps stable (`aoti_torch_*`).

Not imported: `engines.cpu.tensors` compiles this file's text as it does kernels, which it also resembles.  What is
known of a tensor is a record of int64: address, dtype, number of dimensions, sizes, strides.
"""

from numba import carray, cfunc, float32, float64, int64, types

from surefoot.engines.cpu.intrinsics import call, pointer

DIMENSIONS = 8
RECORD = 3 + 2 * DIMENSIONS


@cfunc(types.void(types.int64), error_model="numpy")
def kernel(job):
    """Do what job[0] says: 1 count tensors that differ from their record, and record them; 2 read, 3 write numbers."""
    slots = carray(pointer(job, int64(0)), 11)
    task, count, changed = slots[0], slots[1], 0
    for index in range(count):
        if task <= 1:
            handle = carray(pointer(slots[3], int64(0)), count)[index]
            record = carray(pointer(slots[4] + index * (RECORD * 8), int64(0)), RECORD)
            place = slots[5]
            answer = carray(pointer(place, int64(0)), 1)
            call(slots[6], handle, place)
            differs = record[0] != answer[0]
            record[0] = answer[0]
            answer[0] = 0
            call(slots[7], handle, place)
            differs |= record[1] != answer[0]
            record[1] = answer[0]
            call(slots[8], handle, place)
            differs |= record[2] != answer[0]
            record[2] = answer[0]
            sizes = strides = carray(pointer(place, int64(0)), DIMENSIONS)
            if record[2]:
                call(slots[9], handle, place)
                sizes = carray(pointer(answer[0], int64(0)), DIMENSIONS)
                call(slots[10], handle, place)
                strides = carray(pointer(answer[0], int64(0)), DIMENSIONS)
            for dimension in range(min(record[2], DIMENSIONS)):
                differs |= record[3 + 2 * dimension] != sizes[dimension]
                differs |= record[4 + 2 * dimension] != strides[dimension]
                record[3 + 2 * dimension] = sizes[dimension]
                record[4 + 2 * dimension] = strides[dimension]
            changed += differs
        else:
            address = carray(pointer(slots[3], int64(0)), count)[index]
            wide = carray(pointer(slots[4], int64(0)), count)[index]
            number = pointer(slots[5] + index * 8, float64(0))
            if wide and task == 2:
                carray(number, 1)[0] = carray(pointer(address, float64(0)), 1)[0]
            elif wide:
                carray(pointer(address, float64(0)), 1)[0] = carray(number, 1)[0]
            elif task == 2:
                carray(number, 1)[0] = carray(pointer(address, float32(0)), 1)[0]
            else:
                carray(pointer(address, float32(0)), 1)[0] = float32(carray(number, 1)[0])
    slots[2] = changed
