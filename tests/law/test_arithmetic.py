"""Functions with the same bits everywhere: close to the C library's, and independent of it."""

import ast
import math
import random
from pathlib import Path

import pytest

from ds_gradprune import law
from ds_gradprune.law.arithmetic import exp, fingerprint, hypot, log, power

ROOM = Path(law.__file__).parent


def numbers(seed, count=2000):
    rng = random.Random(seed)
    for _ in range(count):
        yield math.exp(rng.uniform(-40.0, 40.0))
        yield 1.0 + rng.uniform(-1.0, 1.0) * 10.0 ** rng.uniform(-15.0, -0.5)


def test_results_are_those_of_the_c_library_but_for_the_last_bits() -> None:
    # Both are within one unit in the last place of the truth: two apart at most.
    for x in numbers(1):
        assert abs(log(x) - math.log(x)) <= 2 * math.ulp(math.log(x))
        y = math.log(x)
        assert abs(exp(y) - math.exp(y)) <= 2 * math.ulp(math.exp(y))
        assert abs(hypot(x, 0.3) - math.hypot(x, 0.3)) <= math.ulp(math.hypot(x, 0.3))


def test_powers_err_by_their_exponent() -> None:
    rng = random.Random(2)
    for _ in range(2000):
        x, y = math.exp(rng.uniform(-5.0, 5.0)), rng.uniform(-3.0, 3.0)
        allowed = 3.0 * (1.0 + abs(y * math.log(x)))
        assert abs(power(x, y) - x**y) <= allowed * math.ulp(x**y)


def test_exact_values_are_exact() -> None:
    assert log(1.0) == 0.0
    assert exp(0.0) == 1.0
    assert power(7.0, 0.0) == 1.0
    assert hypot(3.0, 4.0) == 5.0


def test_the_smallest_and_the_largest_numbers() -> None:
    for x in (5e-324, 2.2e-308, 1.7e308):
        assert log(x) == pytest.approx(math.log(x), rel=1e-15)
    assert exp(-700.0) == pytest.approx(math.exp(-700.0), rel=1e-15)
    assert exp(700.0) == pytest.approx(math.exp(700.0), rel=1e-15)


@pytest.mark.parametrize("x", [0.0, -1.0, math.inf, math.nan])
def test_logarithm_of_what_has_none_is_refused(x) -> None:
    with pytest.raises(ValueError, match="x must be finite and above 0, got"):
        log(x)


@pytest.mark.parametrize("x", [701.0, -701.0, math.inf, math.nan])
def test_exponential_out_of_range_is_refused(x) -> None:
    with pytest.raises(ValueError, match="x must be between -700 and 700, got"):
        exp(x)


def test_bits_are_the_same_on_every_host() -> None:
    # The same on Intel, AMD and ARM, with any C library and any Python: IEEE 754 says so. Hosts
    # with another fingerprint decide otherwise, so it changes only with the file.
    assert fingerprint() == "0d79cba0"
    assert law.fingerprint is fingerprint


def test_nothing_in_the_room_calls_the_c_library() -> None:
    # Exact by IEEE 754 or by definition; everything else differs between hosts in the last bit.
    allowed = {"ceil", "factorial", "floor", "frexp", "fsum", "inf", "isfinite", "ldexp", "pi"}
    allowed.add("sqrt")
    for path in sorted(ROOM.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "math":
                assert node.attr in allowed, f"{path.name}:{node.lineno} math.{node.attr}"
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
                assert path.name in ("outliers.py", "schedule.py", "arithmetic.py"), (
                    f"{path.name}:{node.lineno} a power, which the C library computes"
                )
                assert isinstance(node.left, ast.Constant)  # of two: exact
                assert node.left.value == 2
