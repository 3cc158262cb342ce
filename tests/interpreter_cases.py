"""What the interpreter computes, bit for bit against torch; run alone, with the stock interpreter.

Each case takes a `jit` and says whether every bit agrees. The functions are plain, so that both interpreters can have
them.
"""

import json
import sys

import torch
import triton.language as tl


def convert(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


def arithmetic(x_ptr, y_ptr, z_ptr, N: tl.constexpr, OP: tl.constexpr):
    offs = tl.arange(0, N)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    if OP == "add":
        z = x + y
    elif OP == "mul":
        z = x * y
    elif OP == "constant":
        z = x * 1.7
    elif OP == "where":
        z = tl.where(x > y, x, y)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    else:
        z = -x
    tl.store(z_ptr + offs, z)


def reduce(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, OP: tl.constexpr):
    rows, offs = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + rows[:, None] * N + offs[None, :])
    y = tl.max(x, axis=1) if OP == "max" else tl.sum(x.to(tl.float32), axis=1)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty))


def dot(x_ptr, y_ptr, z_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(y_ptr + n[:, None] * K + k[None, :])
    tl.store(z_ptr + m[:, None] * N + n[None, :], tl.dot(x, y.T))


def dot_scaled(
    x_ptr, sx_ptr, y_ptr, sy_ptr, z_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    m, n, k, s = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(y_ptr + n[:, None] * K + k[None, :])
    sx = tl.load(sx_ptr + m[:, None] * BLOCK + s[None, :])
    sy = tl.load(sy_ptr + n[:, None] * BLOCK + s[None, :])
    z = tl.dot_scaled(x, sx, FORMAT, y.T, sy, FORMAT)
    tl.store(z_ptr + m[:, None] * N + n[None, :], z)


def limit(x_ptr, y_ptr, N: tl.constexpr, OP: tl.constexpr, NANS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    if OP == "maximum":
        y = tl.maximum(x, -1.0, propagate_nan=NANS)
    elif OP == "minimum":
        y = tl.minimum(x, 1.0, propagate_nan=NANS)
    else:
        y = tl.clamp(x, -1.0, 1.0, propagate_nan=NANS)
    tl.store(y_ptr + tl.arange(0, N), y)


def runtime_range(y_ptr, L):
    total = 0
    for i in range(0, L, 3):
        total += i
    tl.store(y_ptr, total)


def unfilled(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N // 2))


def same(a, b):
    both_nan = a.float().isnan() & b.float().isnan()
    bits = [t.contiguous().view(torch.uint8).view(*t.shape, -1) for t in (a, b)]
    return bool(((bits[0] == bits[1]).all(-1) | both_nan).all())


def generator():
    return torch.Generator().manual_seed(0)


def every_bf16():
    """As fp32, with what lies on and beside the middle between neighbours."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    middle = (x.view(torch.int32) + 2**15).view(torch.float32)
    return torch.cat([x, middle, torch.randn(2**16, generator=generator()) * 50, middle.nextafter(torch.zeros(()))])


def converts(target):
    def case(jit):
        x = every_bf16()
        y = torch.empty(len(x), dtype=target)
        jit(convert)[(1,)](x, y, len(x))
        largest = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}.get(target, torch.inf)
        return same(y, x.clamp(-largest, largest).to(target))

    return case


def widens(source):
    def case(jit):
        bits = torch.arange(256).to(torch.uint8) if source.itemsize == 1 else torch.arange(2**16).to(torch.uint16)
        x = bits.view(source)
        y = torch.empty(len(x))
        jit(convert)[(1,)](x, y, len(x))
        return same(y, x.float())

    return case


def computes(op, reference):
    def case(jit):
        x, y = (torch.randn(512, generator=generator()).roll(i).bfloat16() for i in (0, 7))
        z = torch.empty_like(x)
        jit(arithmetic)[(1,)](x, y, z, 512, op)
        return same(z, reference(x, y))

    return case


def reduces(op, reference):
    def case(jit):
        x = torch.randn(8, 64, generator=generator()).bfloat16()
        y = torch.empty(8, dtype=torch.bfloat16)
        jit(reduce)[(1,)](x, y, 8, 64, op)
        return same(y, reference(x))

    return case


def limits(op, number, reference):
    """A NaN stays where that is asked for, and is `number` otherwise."""

    def case(jit):
        x = torch.randn(64, generator=generator())
        x[7] = torch.nan
        kept, dropped = torch.empty(64), torch.empty(64)
        jit(limit)[(1,)](x, kept, 64, op, tl.PropagateNan.ALL)
        jit(limit)[(1,)](x, dropped, 64, op, tl.PropagateNan.NONE)
        y = reference(x)
        return same(kept, y) and same(dropped, y.nan_to_num(number))

    return case


def multiplies(dtype):
    def case(jit):
        # Small integers: every sum is exact in fp32, in whatever order.
        x, y = (torch.randint(-8, 9, (32, 64), generator=generator()).roll(i).to(dtype) for i in (0, 5))
        z = torch.empty(32, 32)
        jit(dot)[(1,)](x, y, z, 32, 32, 64)
        return same(z, x.float() @ y.float().T)

    return case


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def multiplies_scaled(format, scale_dtype, block):
    def case(jit):
        g, M, K = generator(), 32, 64
        values, codes = [], []
        for _ in range(2):
            if format == "e2m1":
                nibbles = torch.randint(0, 16, (M, K), generator=g).to(torch.uint8)
                codes.append(nibbles[:, ::2] | nibbles[:, 1::2] << 4)
                values.append(E2M1[nibbles.int()])
            else:
                values.append(torch.randint(-8, 9, (M, K), generator=g).float())
                codes.append(values[-1].to(torch.float8_e4m3fn))
        exponents = [torch.randint(-2, 3, (M, K // block), generator=g) for _ in range(2)]
        scales = [
            (e + 127).to(torch.uint8) if scale_dtype == torch.uint8 else (2.0**e).to(scale_dtype) for e in exponents
        ]
        x, y = (v * (2.0**e).repeat_interleave(block, 1) for v, e in zip(values, exponents, strict=True))
        z = torch.empty(M, M)
        args = (codes[0], scales[0], codes[1], scales[1], z, M, M, codes[0].shape[1], K // block, format)
        jit(dot_scaled)[(1,)](*args)
        return same(z, x @ y.T)

    return case


def loops(jit):
    y = torch.zeros(1, dtype=torch.int32)
    jit(runtime_range)[(1,)](y, 10)
    return y.item() == 0 + 3 + 6 + 9


def leaves_undefined(jit):
    y = torch.zeros(64)
    jit(unfilled)[(1,)](torch.ones(64), y, 64)
    return bool(y[32:].isnan().all())


CASES = {
    "fp32 -> bf16": converts(torch.bfloat16),
    "fp32 -> e4m3": converts(torch.float8_e4m3fn),
    "fp32 -> e5m2": converts(torch.float8_e5m2),
    "bf16 -> fp32": widens(torch.bfloat16),
    "e4m3 -> fp32": widens(torch.float8_e4m3fn),
    "e5m2 -> fp32": widens(torch.float8_e5m2),
    "bf16 +": computes("add", lambda x, y: x + y),
    "bf16 *": computes("mul", lambda x, y: x * y),
    "bf16 * constant": computes("constant", lambda x, y: x * torch.tensor(1.7, dtype=torch.bfloat16)),
    "bf16 where": computes("where", torch.maximum),
    "bf16 maximum": computes("maximum", torch.maximum),
    "bf16 negation": computes("negation", lambda x, y: -x),
    "bf16 max": reduces("max", lambda x: x.amax(1)),
    "bf16 dot": multiplies(torch.bfloat16),
    "fp16 dot": multiplies(torch.float16),
    "e4m3 dot": multiplies(torch.float8_e4m3fn),
    "mxfp8 dot": multiplies_scaled("e4m3", torch.uint8, 32),
    "mxfp4 dot": multiplies_scaled("e2m1", torch.uint8, 32),
    "nvfp4 dot": multiplies_scaled("e2m1", torch.float8_e4m3fn, 16),
    "maximum of NaN": limits("maximum", -1.0, lambda x: x.clamp(min=-1)),
    "minimum of NaN": limits("minimum", 1.0, lambda x: x.clamp(max=1)),
    "clamp of NaN": limits("clamp", -1.0, lambda x: x.clamp(-1, 1)),
    "range over a runtime length": loops,
    "masked load without a fill value is undefined": leaves_undefined,
}


def outcomes(jit):
    """Name -> True where every bit agrees, False where one does not, or the error."""
    results = {}
    for name, case in CASES.items():
        try:
            results[name] = case(jit)
        except Exception as error:
            results[name] = type(error).__name__
    return results


if __name__ == "__main__":
    import triton

    json.dump(outcomes(triton.jit), sys.stdout)
