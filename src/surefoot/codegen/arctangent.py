"""The angle of a point, in arithmetic that vectorizes: compiled with kernels, never imported.

The polynomials have the least greatest relative error in the arctangent of numbers from 0 to 1 that their degree
allows: 3e-9 and 5e-18.  Constants are in two parts, so that they are exact to more than an element's precision.
"""


def atan2_float32(y, x):
    """Return the angle of (x, y) as torch.atan2 does, to two units in the last place."""
    width, height = abs(x), abs(y)
    longer, shorter = max(width, height), min(width, height)
    ratio = shorter / longer if shorter < longer else float32(longer > 0)
    angle = small_angle_float32(ratio)
    angle = (float32(1.5707963705062866) - angle) - float32(4.371139000186241e-08) if height > width else angle
    beyond = (float32(3.1415927410125732) - angle) - float32(8.742278000372483e-08)
    angle = beyond if as_uint32(x) & 0x80000000 else angle
    signed = as_float32(as_uint32(angle) | (as_uint32(y) & 0x80000000))
    return signed if (x == x) & (y == y) else x + y


def small_angle_float32(ratio):
    """Return the arctangent of a number from 0 to 1."""
    square = ratio * ratio
    series = float32(-0.0017936231104251775)
    series = series * square + float32(0.010914615489345398)
    series = series * square + float32(-0.031177871433986502)
    series = series * square + float32(0.057957628389979844)
    series = series * square + float32(-0.08403453069865408)
    series = series * square + float32(0.1095218706909365)
    series = series * square + float32(-0.14264242043934644)
    series = series * square + float32(0.19998548342173403)
    series = series * square + float32(-0.3333329909335119)
    return ratio + ratio * (square * series)


def atan2_float64(y, x):
    """Return the angle of (x, y) as torch.atan2 does, to two units in the last place."""
    width, height = abs(x), abs(y)
    longer, shorter = max(width, height), min(width, height)
    ratio = shorter / longer if shorter < longer else float64(longer > 0)
    angle = small_angle_float64(ratio)
    angle = (float64(1.5707963267948966) - angle) + float64(6.123233995736766e-17) if height > width else angle
    beyond = (float64(3.141592653589793) - angle) + float64(1.2246467991473532e-16)
    angle = beyond if as_uint64(x) >> 63 else angle
    signed = as_float64(as_uint64(angle) | ((as_uint64(y) >> 63) << 63))
    return signed if (x == x) & (y == y) else x + y


def small_angle_float64(ratio):
    """Return the arctangent of a number from 0 to 1."""
    square = ratio * ratio
    series = float64(1.3225145038492668e-05)
    series = series * square + float64(-0.00015216160227073794)
    series = series * square + float64(0.0008313254778196085)
    series = series * square + float64(-0.0028849294797024688)
    series = series * square + float64(0.0071965262814827026)
    series = series * square + float64(-0.013900595470889543)
    series = series * square + float64(0.02198489433434995)
    series = series * square + float64(-0.029903895086478772)
    series = series * square + float64(0.036641936346517794)
    series = series * square + float64(-0.04219180335757867)
    series = series * square + float64(0.04722322800540114)
    series = series * square + float64(-0.05253518744025277)
    series = series * square + float64(0.058805278624737035)
    series = series * square + float64(-0.06666404066561225)
    series = series * square + float64(0.07692279840520592)
    series = series * square + float64(-0.09090907003108387)
    series = series * square + float64(0.1111111100703346)
    series = series * square + float64(-0.14285714282575382)
    series = series * square + float64(0.19999999999951465)
    series = series * square + float64(-0.3333333333333307)
    return ratio + ratio * (square * series)
