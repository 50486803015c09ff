"""Vectors of eight floats inside numba: what a loop needs to keep a row of channels in registers.

numba leaves a loop over channels to LLVM's vectoriser, which keeps sums in memory and splits off remainders; loops of
permutohedral filtering ran three times slower for it. Here a vector is a value: `load`, `store`, `add`, `madd`.
Eight floats are one AVX register; where a machine's are shorter or longer, LLVM splits or pairs them. Arrays are
one-dimensional float32, and `i` is the position of the first of the eight; alignment is not needed.
"""

from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

LANES = 8
_LLVM = ir.VectorType(ir.FloatType(), LANES)


class _Vector(types.Type):
    def __init__(self):
        super().__init__(name="float32x8")


VECTOR = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _LLVM)


@no_type_check
def _address(context, builder, array_type, array, i):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [i]), _LLVM.as_pointer())


@no_type_check
def _all(builder, scalar):
    """The vector of eight times the scalar."""
    one = builder.insert_element(ir.Constant(_LLVM, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_LLVM, ir.Undefined), mask)


@intrinsic
@no_type_check
def load(typingctx, array, i):
    """array[i : i + 8]"""

    @no_type_check
    def code(context, builder, signature, args):
        return builder.load(_address(context, builder, signature.args[0], *args), align=4)

    return VECTOR(array, types.intp), code


@intrinsic
@no_type_check
def store(typingctx, array, i, vector):
    """array[i : i + 8] = vector"""

    @no_type_check
    def code(context, builder, signature, args):
        builder.store(args[2], _address(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, VECTOR), code


@intrinsic
@no_type_check
def fill(typingctx, scalar):
    """Eight times the scalar."""

    @no_type_check
    def code(context, builder, signature, args):
        return _all(builder, args[0])

    return VECTOR(types.float32), code


@intrinsic
@no_type_check
def add(typingctx, a, b):
    """a + b"""

    @no_type_check
    def code(context, builder, signature, args):
        return builder.fadd(*args)

    return VECTOR(VECTOR, VECTOR), code


@intrinsic
@no_type_check
def madd(typingctx, a, scalar, b):
    """a + scalar * b, rounded once where the machine can."""

    @no_type_check
    def code(context, builder, signature, args):
        product = builder.fmul(_all(builder, args[1]), args[2], flags=("contract",))
        return builder.fadd(args[0], product, flags=("contract",))

    return VECTOR(VECTOR, types.float32, VECTOR), code


@intrinsic
@no_type_check
def sub(typingctx, a, b):
    """a - b"""

    @no_type_check
    def code(context, builder, signature, args):
        return builder.fsub(*args)

    return VECTOR(VECTOR, VECTOR), code


@intrinsic
@no_type_check
def mul(typingctx, a, b):
    """a * b"""

    @no_type_check
    def code(context, builder, signature, args):
        return builder.fmul(*args)

    return VECTOR(VECTOR, VECTOR), code


@no_type_check
def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
@no_type_check
def larger(typingctx, a, b):
    """The larger of each pair; NaN in `a` gives b."""

    @no_type_check
    def code(context, builder, signature, args):
        return _larger(builder, *args)

    return VECTOR(VECTOR, VECTOR), code


@no_type_check
def _folded(builder, a, operation):
    """`operation` over the eight, by halves."""
    nothing = ir.Constant(_LLVM, ir.Undefined)
    for step in (4, 2, 1):
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [(i + step) % LANES for i in range(LANES)])
        a = operation(a, builder.shuffle_vector(a, nothing, mask))
    return builder.extract_element(a, ir.Constant(ir.IntType(32), 0))


@intrinsic
@no_type_check
def total(typingctx, a):
    """The sum of the eight."""

    @no_type_check
    def code(context, builder, signature, args):
        return _folded(builder, args[0], builder.fadd)

    return types.float32(VECTOR), code


@intrinsic
@no_type_check
def highest(typingctx, a):
    """The largest of the eight."""

    @no_type_check
    def code(context, builder, signature, args):
        return _folded(builder, args[0], lambda x, y: _larger(builder, x, y))

    return types.float32(VECTOR), code


@intrinsic
@no_type_check
def above(typingctx, a, bound):
    """Bit i of the result is set where number i is above the scalar."""

    @no_type_check
    def code(context, builder, signature, args):
        bits = builder.bitcast(builder.fcmp_ordered(">", args[0], _all(builder, args[1])), ir.IntType(LANES))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(VECTOR, types.float32), code


@intrinsic
@no_type_check
def lowest_bit(typingctx, bits):
    """The position of the lowest bit that is set, of at least one."""

    @no_type_check
    def code(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), code


# exp(r) on |r| <= ln(2) / 2: Taylor's coefficients, whose remainder is below 2e-8 there.
_EXP = [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0]


@intrinsic
@no_type_check
def exp(typingctx, a):
    """e to the power of numbers up to 80, to about float32 rounding; 0 below -60, which spares the slow arithmetic with
    the tiny numbers that products with it would be."""

    @no_type_check
    def code(context, builder, signature, args):
        def constant(x):
            return ir.Constant(_LLVM, [ir.Constant(ir.FloatType(), np.float32(x))] * LANES)

        def fused(x, y, z):
            return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))

        integers = ir.VectorType(ir.IntType(32), LANES)
        x = _larger(builder, args[0], constant(-61))
        # Adding 1.5 * 2^23 rounds to an integer n, which then stands in the lowest bits.
        shifted = fused(x, constant(1 / np.log(2)), constant(12582912.0))
        n = builder.fsub(shifted, constant(12582912.0))
        r = fused(n, constant(-0.693359375), x)  # ln(2) in two parts, the first with few bits
        r = fused(n, constant(0.693359375 - np.log(2)), r)
        y = constant(_EXP[0])
        for coefficient in _EXP[1:]:
            y = fused(y, r, constant(coefficient))
        power = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [23] * LANES))
        y = builder.bitcast(builder.add(builder.bitcast(y, integers), power), _LLVM)
        return builder.select(builder.fcmp_ordered(">", args[0], constant(-60)), y, constant(0))

    return VECTOR(VECTOR), code


@intrinsic
@no_type_check
def at(typingctx, array, i):
    """array[i] of any one-dimensional array, for i that are never negative: no check for counting from the end."""

    @no_type_check
    def code(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return array.dtype(array, types.intp), code
