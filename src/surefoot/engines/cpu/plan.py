"""A plan: what the CPU engine keeps of a bucket between steps so that a step costs little more than reading gradients.

A plan is a cache: `step/cache.py` tells whether everything it was made from is still so.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from surefoot.codegen.compile import Kernel
from surefoot.engines.bucket import Bucket, EachParameter
from surefoot.engines.checked import checked
from surefoot.engines.cpu.compile import compiled_kernel
from surefoot.engines.cpu.copied import CopyLaunch, copying
from surefoot.engines.cpu.launch import TensorLaunch, combined
from surefoot.engines.cpu.source import Layout
from surefoot.errors import InternalError
from surefoot.rule import Rule
from surefoot.storage import format_of
from surefoot.tensors.native.guards import VersionCounters


class Plan:
    """A bucket's pointer table, the kernels that run on it, and the tensors that cannot be seen as flat memory."""

    def __init__(self, bucket: Bucket) -> None:
        arrays = bucket.arrays()
        bucket.gradient_addresses = arrays.addresses[1]
        param, *slots = bucket.kept
        self._compute, self._stored = bucket.compute_dtype, (param, format_of(arrays.dtypes[1]), *slots)
        self.regular, self.irregular = np.flatnonzero(arrays.flat), np.flatnonzero(~arrays.flat).tolist()
        self._sizes = arrays.sizes[self.regular]
        self.launch = TensorLaunch(len(arrays.addresses), self._sizes)
        self.launch.pointers[:] = arrays.addresses[:, self.regular]
        if bucket.is_rounded:
            known = [bucket.identities[index] for index in self.regular.tolist()]
            self.launch.set_random(bucket.seed, [who.number for who in known], [who.first or 0 for who in known])
        self._launches, self._copied = [self.launch], list[CopyLaunch]()
        self._kernels: dict[Rule, Kernel] = {}
        self.row: np.ndarray | None = None
        self.checked = checked()
        self.versions = VersionCounters(list(chain.from_iterable(bucket.columns())))

    def kernel(self, rule: Rule) -> Kernel:
        """Return the kernel of a rule."""
        self.prepare(rule)
        return self._kernels[rule]

    @property
    def is_regular(self) -> bool:
        """Whether all tensors are flat memory."""
        return not self.irregular

    def set_rows(self, rows: np.ndarray) -> None:
        """Set for each tensor its row of coefficients."""
        if self.row is not rows:
            self.row, self.launch.rows[:] = rows, self._regular(rows)

    def take_gradients(self, addresses: np.ndarray) -> None:
        """Let gradients be at these addresses, of all tensors, that a guard has seen."""
        self.launch.pointers[1] = self._regular(addresses)

    def _regular(self, values: np.ndarray) -> np.ndarray:
        return values[self.regular] if self.irregular else values

    def move(self, addresses: np.ndarray) -> None:
        """Go over to other memory for the same tensors, proved to be at these addresses: of shape (arrays, tensors)."""
        for launch in self._launches:
            launch.pointers[:] = addresses[:, self.regular] if self.irregular else addresses
        self._copied = []

    def prepare(self, rule: Rule) -> None:
        """Compile the kernel of a rule."""
        if rule not in self._kernels:
            stored = self._stored[: 2 + len(rule.slots)]
            if len(stored) < len(self._stored):  # corrections then stand elsewhere, and the parameter is not read
                stored = (format_of(stored[0].dtype), *stored[1:])
            layout = Layout(self._compute, stored)
            self._kernels[rule] = compiled_kernel(rule, layout, self.checked)

    def run(self, bucket: Bucket) -> None:
        """Update the bucket's parameters and slots, and measure what its rule measures."""
        numbers = numbers_of(bucket, bucket.rule)
        self.set_rows(bucket.row)
        self.versions.count()  # before the kernel, which drives from the caches what was just looked at
        bucket.measured = self._run(bucket.rule, bucket, numbers, bucket.row)

    def measure(self, bucket: Bucket, rule: Rule) -> Tensor | None:
        """Return what a rule measures, and leave everything as it is."""
        rows = bucket.row if rule.coefficients else np.zeros(len(bucket.params), dtype=np.int64)
        self.row, self.launch.rows[:] = None, self._regular(rows)
        self.prepare(rule)
        return self._run(rule, bucket, numbers_of(bucket, rule), rows)

    def gradient_measure(self, rule: Rule) -> Callable[[np.ndarray], np.ndarray]:
        """Return what measures by a rule of gradients, when all tensors are flat memory.

        Returns:
            A function of the addresses of the gradients, which gives float64 of shape (tensors, reductions) in an array
            that its next call may overwrite.
        """
        kernel, launch = self.kernel(rule), TensorLaunch(len(self.launch.pointers), self._sizes)
        launch.pointers[:] = self.launch.pointers
        self._launches.append(launch)
        measured = launch.measure_into(rule.reductions)

        def measure(gradients: np.ndarray) -> np.ndarray:
            launch.pointers[1] = gradients
            return launch.run_again(kernel, measured, rule.reductions)

        return measure

    def _run(self, rule: Rule, bucket: Bucket, numbers: np.ndarray, rows: np.ndarray) -> Tensor | None:
        kernel = self._kernels[rule]
        if bucket.gradient_addresses is None:
            raise InternalError("a kernel was run on gradients that no guard has seen")
        self.take_gradients(bucket.gradient_addresses)
        if kernel.checked:
            now = bucket.arrays()
            self.launch.set_limits(now.addresses[:, self.regular], now.available[:, self.regular])
        measured = self.launch.run(kernel, numbers, rule.reductions)
        if self.irregular:
            regular, measured = measured, self.run_copied(rule, bucket, bucket.grads, numbers, rows)
            measured[self.regular] = regular
        return torch.from_numpy(measured) if rule.reductions else None

    def run_copied(
        self, rule: Rule, bucket: Bucket, grads: Sequence[Tensor], numbers: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Run on the tensors that are not flat memory; return what is measured: of shape (tensors, reductions)."""
        launches, kernel = self._copied or copying(bucket, grads, self.irregular), self._kernels[rule]
        if bucket.is_plain:  # others are as large as the largest tensor
            self._copied = launches
        parts = [launch.run_copied(rule, kernel, grads, numbers, rows) for launch in launches]
        if not (parts and rule.reductions):
            return np.zeros((len(rows), len(rule.reductions)))
        owners = [launch.owners for launch in launches]
        return combined(rule.reductions, np.concatenate(parts), np.concatenate(owners), len(rows))


def numbers_of(bucket: Bucket, rule: Rule) -> np.ndarray:
    """Return the coefficients of a rule as kernels take them: float64 of shape (sets of them, coefficients)."""
    names = rule.coefficients
    if isinstance(bucket.coefficients, EachParameter):
        return bucket.coefficients.table(names)
    rows = bucket.coefficients if names else [{}]
    return np.array([[float(row[name]) for name in names] for row in rows]).reshape(len(rows), len(names))
