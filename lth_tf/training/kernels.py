"""The steps of a sparse network, compiled by numba: its formulas, on kept weights alone.

The network is one list of units: the inputs in use, then those of each layer. Activations lie in
rows, `a[unit, example]`, so that a weight is one multiply-add of two rows. The weights into a unit
lie side by side in `p`, from `ptr[unit]` to `ptr[unit + 1]`, their sources in `source`; those out
of it are listed in `out_*`, as where they are in `p` and which unit they lead to. Behind the
weights `p` holds the biases.

Imported by `sparse` alone, which says where numba keeps what it has compiled.
"""

from __future__ import annotations

import platform
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LINEAR, RELU, TANH, SIGMOID = range(4)
MOMENTUM, NESTEROV, ADAM = range(3)

# Without nnan and ninf: a loss that is not finite must be seen.
_FAST: dict[str, Any] = {
    "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy", "cache": True,
    "nogil": True,
}  # fmt: skip


def _flushed(typing: Any, word: Any) -> Any:
    """Sets the word that says whether a thread flushes denormals, -1: it does; returns the old.

    As the loss goes to 0, numbers too small for the usual format are five times slower.
    """

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = ir.IntType(32)
        if platform.machine() not in ("x86_64", "AMD64"):  # only there are they slow
            return ir.Constant(kind, 0)
        slot = cgutils.alloca_once(builder, kind)
        at = builder.bitcast(slot, ir.IntType(8).as_pointer())
        function = ir.FunctionType(ir.VoidType(), [at.type])
        name = "llvm.x86.sse.{}mxcsr".format
        builder.call(cgutils.get_or_insert_function(builder.module, function, name("st")), [at])
        old = builder.load(slot)
        flush = builder.icmp_signed("<", given[0], ir.Constant(given[0].type, 0))
        new = given[0] if given[0].type == kind else builder.trunc(given[0], kind)
        builder.store(builder.select(flush, builder.or_(old, ir.Constant(kind, 0x8040)), new), slot)
        builder.call(cgutils.get_or_insert_function(builder.module, function, name("ld")), [at])
        return old

    return types.int32(word), code


_flushing: Any = intrinsic(_flushed)


@njit(inline="always", **_FAST)
def _add_rows(row: Any, p: Any, edge: Any, rows: Any, unit: Any, first: int, last: int) -> None:
    """row += sum over k in first .. last - 1 of p[edge[k]] rows[unit[k]], four at a time."""
    k = first
    while k + 4 <= last:
        w, x, y, z = p[edge[k]], p[edge[k + 1]], p[edge[k + 2]], p[edge[k + 3]]
        e, f, g, h = rows[unit[k]], rows[unit[k + 1]], rows[unit[k + 2]], rows[unit[k + 3]]
        for b in range(len(row)):
            row[b] += w * e[b] + x * f[b] + y * g[b] + z * h[b]
        k += 4
    while k < last:
        w, e = p[edge[k]], rows[unit[k]]
        for b in range(len(row)):
            row[b] += w * e[b]
        k += 1


@njit(**_FAST)
def _forward(inputs: Any, starts: Any, p: Any, net: Any, a: Any) -> None:
    """a = f(W a + b), layer after layer, of the examples that begin at `starts`."""
    ptr, edge, source, _, _, _, pixels, scale, shift, kind, bias, _ = net
    for u in range(len(pixels)):
        pixel, factor, term, row = pixels[u], scale[u], shift[u], a[u]
        for b in range(len(starts)):
            row[b] = inputs[starts[b] + pixel] * factor + term
    for u in range(len(kind)):
        row, zero = a[len(pixels) + u], a.dtype.type(0)
        row[:] = p[bias[u]] if bias[u] >= 0 else zero
        _add_rows(row, p, edge, a, source, ptr[u], ptr[u + 1])
        if kind[u] == RELU:
            for b in range(len(row)):
                row[b] = zero if row[b] <= zero else row[b]  # NaN stays
        elif kind[u] == TANH:
            for b in range(len(row)):
                row[b] = np.tanh(row[b])
        elif kind[u] == SIGMOID:
            for b in range(len(row)):
                row[b] = 1 / (1 + np.exp(-row[b]))


@njit(**_FAST)
def _losses(a: Any, d: Any, labels: Any, outputs: int, share: Any) -> tuple[float, int]:
    """Sum of -log softmax(a)[label], and of hits; d = share (softmax(a) - [label])."""
    o, total, hits = len(a) - outputs, 0.0, 0
    for b in range(len(labels)):
        best = o
        for j in range(o + 1, len(a)):
            if a[j, b] > a[best, b]:
                best = j
        high, near = a[best, b], a.dtype.type(0)
        for j in range(o, len(a)):
            d[j, b] = np.exp(a[j, b] - high)
            near += d[j, b]
        right = o + labels[b]
        total += np.log(near) - (a[right, b] - high)
        hits += best == right
        for j in range(o, len(a)):
            d[j, b] = d[j, b] / near * share
        d[right, b] -= share
    return total, hits


@njit(**_FAST)
def _backward(p: Any, net: Any, a: Any, d: Any, g: Any) -> None:
    """d = W' d f'(a), from the last layer on; g = d a' for weights, the sum of d for biases."""
    ptr, _, source, out_ptr, out_edge, out_unit, pixels, _, _, kind, bias, outputs = net
    for u in range(len(kind) - 1, -1, -1):
        row, at = d[len(pixels) + u], a[len(pixels) + u]
        if u < len(kind) - outputs:
            row[:] = 0
            _add_rows(row, p, out_edge, d, out_unit, out_ptr[u], out_ptr[u + 1])
            if kind[u] == RELU:
                for b in range(len(row)):
                    row[b] = row[b] if at[b] > 0 else 0 * row[b]
            elif kind[u] == TANH:
                for b in range(len(row)):
                    row[b] *= 1 - at[b] * at[b]
            elif kind[u] == SIGMOID:
                for b in range(len(row)):
                    row[b] *= at[b] * (1 - at[b])
        if bias[u] >= 0:
            total = d.dtype.type(0)
            for b in range(len(row)):
                total += row[b]
            g[bias[u]] = total
        for k in range(ptr[u], ptr[u + 1]):
            total, other = d.dtype.type(0), a[source[k]]
            for b in range(len(row)):
                total += row[b] * other[b]
            g[k] = total


@njit(**_FAST)
def _update(rule: int, p: Any, m: Any, v: Any, g: Any, rate: Any, by: Any) -> None:
    """A step of an optimizer as tf_keras has it; `by` says how.

    It is beta 1 or momentum, 1 - that, 1 - beta 2, epsilon, L2, decay. g + L2 p is the gradient.
    With decoupled decay p loses rate x decay x p first.
    """
    one, first, second, epsilon, l2, decay = by[0], by[1], by[2], by[3], by[4], by[5]
    plain = rate[1]
    for k in range(len(p)):
        p[k] -= p[k] * decay * plain
        y = g[k] + l2 * p[k]
        if rule == ADAM:
            m[k] += (y - m[k]) * first
            v[k] += (y * y - v[k]) * second
            p[k] -= m[k] * rate[0] / (np.sqrt(v[k]) + epsilon)
        else:
            m[k] = m[k] * one - y * plain
            p[k] += m[k] * one - y * plain if rule == NESTEROV else m[k]


def _train(
    inputs: Any, starts: Any, labels: Any, rates: Any, rule: int, by: Any, net: Any, state: Any,
    work: Any, losses: Any,
) -> None:  # fmt: skip
    """A step for each row of `starts`: threads share the examples, then the weights."""
    (p, m, v), (a, d, g, sums) = state, work
    threads, n, (steps, batch) = len(a), len(p), labels.shape
    for s in range(steps):
        for t in prange(threads):
            old = _flushing(-1)
            lo, hi = batch * t // threads, batch * (t + 1) // threads
            _forward(inputs, starts[s][lo:hi], p, net, a[t])
            share = p.dtype.type(1 / batch)
            sums[t] = _losses(a[t], d[t], labels[s][lo:hi], net[-1], share)[0]
            _backward(p, net, a[t], d[t], g[t])
            _flushing(old)
        losses[s] = sums.sum() / batch
        for t in prange(threads):
            old = _flushing(-1)
            lo, hi = n * t // threads, n * (t + 1) // threads
            # Slices: in loops from 0 on numba looks for no negative indices, and vectorises.
            total = g[0][lo:hi]
            for other in range(1, threads):
                total += g[other][lo:hi]
            _update(rule, p[lo:hi], m[lo:hi], v[lo:hi], total, rates[s], by)
            _flushing(old)


def _evaluate(
    inputs: Any, starts: Any, labels: Any, net: Any, p: Any, a: Any, d: Any, sums: Any, hits: Any
) -> None:
    """Adds up losses and hits of examples, as many at a time as a row has room for."""
    room, n, threads = a.shape[2], len(labels), len(a)
    for t in prange(threads):
        old = _flushing(-1)
        for lo in range(t * room, n, threads * room):
            hi = min(lo + room, n)
            _forward(inputs, starts[lo:hi], p, net, a[t])
            loss, hit = _losses(a[t], d[t], labels[lo:hi], net[-1], p.dtype.type(1))
            sums[t] += loss
            hits[t] += hit
        _flushing(old)


def _compiled(function: Any) -> tuple[Any, Any]:
    """For one thread and for more, under two names: numba's cache ignores `parallel`."""
    name = function.__name__ + "_parallel"
    copy = FunctionType(function.__code__, function.__globals__, name)
    copy.__qualname__ = name
    return njit(**_FAST)(function), njit(parallel=True, **_FAST)(copy)


TRAIN, EVALUATE = _compiled(_train), _compiled(_evaluate)
