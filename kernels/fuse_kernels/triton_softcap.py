"""Soft-capped logits in the Triton kernels: z = CAP tanh(x / CAP), and dz / dx. See softcap.py.

CAP is a constant of the compiled kernel. If it is None, these functions leave no instruction behind.

tanh is written with the operations that every GPU and the interpreter have. Its error is at most a few units
in the last place of fp32, it never exceeds 1, and equal x have equal z in all kernels: products that are
added are explicit `fma`, so that no compiler rounds one of them and not another.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _far_terms(y):
    """e = exp(-2 |y|) and 1 / (1 + e): with them tanh |y| = 1 - 2 e / (1 + e)."""
    e = tl.exp2(tl.abs(y) * (-2.0 * _LOG2E))
    return e, 1.0 / (1.0 + e)


@triton.jit
def capped(x, CAP: tl.constexpr):
    """z of logits x in fp32: x itself if CAP is None. Infinite x stay as they are."""
    if CAP is None:
        z = x
    else:
        # Near 0 the difference 1 - 2 e / (1 + e) has few correct digits. There
        #     tanh y = y + y^3 polynomial(y^2),
        # with the coefficients of least relative error up to y = 0.6: it is 3e-9.
        y = x * (1.0 / CAP)
        square = y * y
        polynomial = tl.fma(square, -0.005895108, 0.020795932)
        polynomial = tl.fma(polynomial, square, -0.053783819)
        polynomial = tl.fma(polynomial, square, 0.133319244)
        polynomial = tl.fma(polynomial, square, -0.333332986)
        near = tl.fma(polynomial * square, y, y)
        e, inverse = _far_terms(y)
        far = tl.fma(-2.0 * e, inverse, 1.0)
        tanh = tl.where(tl.abs(y) < 0.6, near, tl.where(y < 0.0, -far, far))
        z = tl.where(tl.abs(y) == _INFINITY, y, tanh * CAP)
    return z


@triton.jit
def times_slope(gradient, x, CAP: tl.constexpr):
    """gradient times dz / dx: the gradient of logits x from that of z. The same if CAP is None."""
    if CAP is None:
        result = gradient
    else:
        # 1 - tanh^2 = 4 e / (1 + e)^2, which keeps its digits where z is nearly CAP.
        e, inverse = _far_terms(x * (1.0 / CAP))
        result = gradient * (4.0 * e * inverse * inverse)
    return result
