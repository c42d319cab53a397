"""Where elements stand in memory, compared with counting them."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from surefoot.tensors import memory
from surefoot.tensors.gate import admit, admit_rows

DTYPES = (torch.float32, torch.bfloat16, torch.complex64, torch.float64)


def strided(shape, strides, offset=0, dtype=torch.float32):
    """A view of a storage that just holds it."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    length = offset + (last + 1 if all(shape) else 0)
    return torch.zeros(max(length, offset), dtype=dtype).as_strided(shape, strides, offset)


def offsets(tensor):
    """Count the elements' places in bytes from the storage's beginning, one after the other."""
    base, found = tensor.untyped_storage().data_ptr(), []
    for index in np.ndindex(*tensor.shape):
        place = (
            tensor.data_ptr()
            - base
            + tensor.element_size() * sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True))
        )
        found.append(place)
    return found


views = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=4).flatmap(
    lambda dims: st.tuples(
        st.just(tuple(size for size, _ in dims)),
        st.just(tuple(stride for _, stride in dims)),
        st.integers(0, 3),
        st.sampled_from(DTYPES),
    )
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(views)
def test_a_tensor_spans_what_its_elements_do(view):
    tensor = strided(*view)
    found, size = offsets(tensor), tensor.element_size()
    assert memory.bytes_spanned(tensor) == (max(found) + size - min(found) if found else 0)
    assert memory.overlaps_itself(tensor) == (len(set(found)) < len(found))
    assert memory.has_memory(tensor)
    filled = sorted(found) == list(range(min(found, default=0), min(found, default=0) + size * len(found), size))
    assert memory.is_dense(tensor) == filled
    if found:
        assert memory.bytes_available(tensor) == tensor.untyped_storage().nbytes() - min(found)
        tensor.untyped_storage().resize_(max(found) + size - 1)
        assert not memory.has_memory(tensor)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(views, min_size=2, max_size=5), st.data())
def test_shared_memory_is_found(found, data):
    base = torch.zeros(200)
    tensors = [base.as_strided(shape, strides, 3 * offset) for shape, strides, offset, _ in found]
    places = [set(offsets(tensor)) for tensor in tensors]
    only_read = data.draw(st.sampled_from([[], [index % 2 == 0 for index in range(len(tensors))]]))

    def counts(i, j):
        return not only_read or only_read[i] != only_read[j]

    pairs = {(i, j) for j in range(len(tensors)) for i in range(j) if places[i] & places[j] and counts(i, j)}
    shared = memory.shared_memory(tensors, counts)
    assert (shared in pairs) if pairs else (shared is None)


def test_columns_of_one_matrix_share_nothing():
    matrix = torch.zeros(50, 40)
    columns = [matrix[:, index] for index in range(40)]
    assert memory.shared_memory(columns) is None
    assert memory.shared_memory([*columns, matrix[3:4, 2:5]]) is not None


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 5), (1, 3, 1, 2), ()])
def test_layouts_are_compared_where_they_matter(shape):
    tensor = torch.zeros(shape)
    assert memory.same_dense_layout([tensor, tensor.clone()])
    turned = torch.zeros(shape[::-1]).permute(tuple(range(len(shape)))[::-1])
    assert memory.same_dense_layout([tensor, turned]) == (sum(size > 1 for size in shape) < 2)


REFUSED = {
    "has shape (2, 3), must have (3, 2)": lambda: torch.zeros(2, 3),
    "is torch.float64, must be torch.float32": lambda: torch.zeros(3, 2, dtype=torch.float64),
    "is on meta, must be on cpu": lambda: torch.zeros(3, 2, device="meta"),
    "must be a plain tensor": lambda: torch.zeros(3, 2).to_sparse(),
    "has lost memory: its storage has been resized to 20 bytes": lambda: shrunk(torch.zeros(3, 2), 20),
    "has lost memory: its storage has been resized to 0 bytes": lambda: shrunk(torch.zeros(3, 2), 0),
}


def shrunk(tensor, size):
    tensor.untyped_storage().resize_(size)
    return tensor


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("row", [0, 1])
def test_the_gate_names_what_it_refuses(reason, row):
    columns = [[torch.zeros(3, 2) for _ in range(2)] for _ in range(3)]
    if row == 0 and "float64" in reason:
        columns[2][0] = torch.zeros(3, 2, dtype=torch.float64)  # the first says what a column is
        columns[2][1] = torch.zeros(3, 2)
        row, reason = 1, "is torch.float32, must be torch.float64"
    else:
        columns[2][row] = REFUSED[reason]()
    with pytest.raises(RuntimeError) as error:
        admit(columns, ("", "the gradient of ", "state `x` of "), "tensor {}".format)
    assert str(error.value).startswith(f"state `x` of tensor {row} ")
    assert reason in str(error.value)


def test_the_gate_tells_where_and_how_much():
    base = torch.zeros(100)
    columns = [[base[10:16].view(2, 3), torch.zeros(4)], [base[50:56].view(3, 2).t(), torch.zeros(4)]]
    arrays = admit(columns, ("", ""), str)
    assert arrays.addresses.tolist() == [[t.data_ptr() for t in column] for column in columns]
    assert arrays.available.tolist() == [[360, 16], [200, 16]]
    assert arrays.sizes.tolist() == [6, 4]
    assert arrays.flat.tolist() == [False, True]


@pytest.mark.parametrize(
    ("index", "values", "error"),
    [
        ([[0, 4]], torch.ones(2, 3), IndexError),
        ([[0, -1]], torch.ones(2, 3), IndexError),
        ([[0, 1]], shrunk(torch.ones(2, 3), 12), RuntimeError),
    ],
)
def test_rows_outside_of_a_gradient_are_refused(index, values, error):
    grad = torch.ops.aten._sparse_coo_tensor_unsafe(torch.tensor(index), values, (4, 3))
    with pytest.raises(error, match=r"^`table`: a sparse gradient of shape \(4, 3\) has"):
        admit_rows(grad._coalesced_(True), lambda: "`table`")
