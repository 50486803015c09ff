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
def lowest_bit(typingctx, bits):
    """The position of the lowest bit that is set, of at least one."""

    @no_type_check
    def code(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), code


# exp(r) on |r| <= ln(2) / 2, highest power first: the polynomial of least relative error, 8e-8.
_EXP = [0.008291716685, 0.041915028542, 0.166676628377, 0.499988990758, 0.999999666162, 1.00000007103]
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)


@no_type_check
def _floats(x):
    return ir.Constant(_LLVM, [ir.Constant(ir.FloatType(), np.float32(x))] * LANES)


@no_type_check
def _integers(n):
    return ir.Constant(_INTEGERS, [n] * LANES)


@intrinsic
@no_type_check
def exp(typingctx, a):
    """e to the power of numbers from -60 to 80, to 5e-7; of smaller ones it is e^-60, which spares the slow arithmetic
    with the tiny numbers that products with it would be."""

    @no_type_check
    def code(context, builder, signature, args):
        def fused(x, y, z):
            return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))

        x = _larger(builder, args[0], _floats(-60))
        # Adding 1.5 * 2^23 rounds to an integer n, which then stands in the lowest bits.
        shifted = fused(x, _floats(1 / np.log(2)), _floats(12582912.0))
        n = builder.fsub(shifted, _floats(12582912.0))
        r = fused(n, _floats(-0.693359375), x)  # ln(2) in two parts, the first with few bits
        r = fused(n, _floats(0.693359375 - np.log(2)), r)
        y = _floats(_EXP[0])
        for coefficient in _EXP[1:]:
            y = fused(y, r, _floats(coefficient))
        power = builder.shl(builder.bitcast(shifted, _INTEGERS), _integers(23))
        return builder.bitcast(builder.add(builder.bitcast(y, _INTEGERS), power), _LLVM)

    return VECTOR(VECTOR), code


# Numbers from 0 to 1 in 16 bits: 5 of the exponent, 11 of the mantissa. Rounding is within 2^-12 of a number, and
# 2^-31 stands for everything below.
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_LOWEST = (127 - 31) << 23  # 2^-31 as the bits of a float


@no_type_check
def _short_address(context, builder, array_type, array, i):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [i]), _SHORTS.as_pointer())


@intrinsic
@no_type_check
def load_short(typingctx, array, i):
    """array[i : i + 8] of uint16, as `store_short` has left them."""

    @no_type_check
    def code(context, builder, signature, args):
        shorts = builder.load(_short_address(context, builder, signature.args[0], *args), align=2)
        bits = builder.shl(builder.zext(shorts, _INTEGERS), _integers(12))
        return builder.bitcast(builder.add(bits, _integers(_LOWEST)), _LLVM)

    return VECTOR(array, types.intp), code


@intrinsic
@no_type_check
def store_short(typingctx, array, i, vector):
    """Eight numbers from 0 to 1, rounded to 16 bits, as array[i : i + 8] of uint16."""

    @no_type_check
    def code(context, builder, signature, args):
        bits = builder.add(builder.bitcast(args[2], _INTEGERS), _integers((1 << 11) - _LOWEST))
        bits = builder.select(builder.icmp_signed(">", bits, _integers(0)), bits, _integers(0))
        shorts = builder.trunc(builder.lshr(bits, _integers(12)), _SHORTS)
        builder.store(shorts, _short_address(context, builder, signature.args[0], *args[:2]), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, VECTOR), code


@intrinsic
@no_type_check
def short_at(typingctx, array, i):
    """array[i] of uint16, as `store_short` has left it."""

    @no_type_check
    def code(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        bits = builder.zext(builder.load(builder.gep(data, [args[1]])), ir.IntType(32))
        bits = builder.add(builder.shl(bits, ir.Constant(ir.IntType(32), 12)), ir.Constant(ir.IntType(32), _LOWEST))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(array, types.intp), code


@intrinsic
@no_type_check
def short_above(typingctx, array, i, bound):
    """Bit j of the result is set where array[i + j] of uint16 is above the bound, for j from 0 to 7."""

    @no_type_check
    def code(context, builder, signature, args):
        shorts = builder.load(_short_address(context, builder, signature.args[0], *args[:2]), align=2)
        one = builder.insert_element(ir.Constant(_SHORTS, ir.Undefined), args[2], ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        bounds = builder.shuffle_vector(one, ir.Constant(_SHORTS, ir.Undefined), mask)
        bits = builder.bitcast(builder.icmp_unsigned(">", shorts, bounds), ir.IntType(LANES))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(array, types.intp, types.uint16), code


@intrinsic
@no_type_check
def above(typingctx, a, b):
    """Bit j of the result is set where a[j] > b[j]."""

    @no_type_check
    def code(context, builder, signature, args):
        bits = builder.bitcast(builder.fcmp_ordered(">", *args), ir.IntType(LANES))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(VECTOR, VECTOR), code


@intrinsic
@no_type_check
def size(typingctx, a):
    """|a|"""

    @no_type_check
    def code(context, builder, signature, args):
        bits = builder.and_(builder.bitcast(args[0], _INTEGERS), _integers(0x7FFFFFFF))
        return builder.bitcast(bits, _LLVM)

    return VECTOR(VECTOR), code


@intrinsic
@no_type_check
def turn(typingctx, source, i, step, target, j, width):
    """target[j + width * r + c] = source[i + step * c + r] for r and c up to 7: eight vectors as a square, turned."""

    @no_type_check
    def code(context, builder, signature, args):
        source, i, step, target, j, width = args
        rows = []
        for _ in range(LANES):
            rows.append(builder.load(_address(context, builder, signature.args[0], source, i), align=4))
            i = builder.add(i, step)
        apart = LANES // 2
        while apart:  # swaps the upper right quarter with the lower left, of each square twice as wide
            for r in range(LANES):
                if not r & apart:
                    upper, lower = rows[r], rows[r + apart]
                    left = [lane + (LANES - apart if lane & apart else 0) for lane in range(LANES)]
                    right = [lane + (LANES if lane & apart else apart) for lane in range(LANES)]
                    for place, lanes in ((r, left), (r + apart, right)):
                        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes)
                        rows[place] = builder.shuffle_vector(upper, lower, mask)
            apart //= 2
        for row in rows:
            builder.store(row, _address(context, builder, signature.args[3], target, j), align=4)
            j = builder.add(j, width)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), code


@intrinsic
@no_type_check
def count_bits(typingctx, bits):
    """How many bits are set."""

    @no_type_check
    def code(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.int64), code


@intrinsic
@no_type_check
def at(typingctx, array, i):
    """array[i] of any one-dimensional array, for i that are never negative: no check for counting from the end."""

    @no_type_check
    def code(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return array.dtype(array, types.intp), code
