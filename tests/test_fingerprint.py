"""Which functions have results of their own, which are the same in every process, and which cannot be told apart."""

from __future__ import annotations

import ast
import enum
import functools
import math
import operator
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmcache import Cache
from shmcache.fingerprint import fingerprint
from tests.serving import PATIENCE, ROOT


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Flat:
    @classmethod
    def area(cls, n: int) -> int:
        return n


class Tall(Flat):
    pass


def scaled_by(factor: Any) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) * factor

        return wrapper

    return decorate


def plain(n: Any, m: Any = None) -> Any:
    return n, m


def over(value: Any) -> Callable[..., Any]:
    """What closes over a value."""
    return lambda n: (value, n)


def with_default(value: Any) -> Callable[..., Any]:
    def function(n: int, scale: Any = value) -> Any:
        return (n, scale)

    return function


def with_keyword_default(value: Any) -> Callable[..., Any]:
    def function(n: int, *, scale: Any = value) -> Any:
        return (n, scale)

    return function


def with_attribute(value: Any) -> Callable[..., Any]:
    def function(n: int) -> int:
        return n

    function.__dict__["scale"] = value
    return function


def of_source(source: str, **variables: Any) -> Callable[..., Any]:
    exec(source, variables)
    function: Callable[..., Any] = variables["f"]
    return function


def of_constant(value: Any) -> Callable[..., Any]:
    """A function whose code has this constant, which source may not be able to say."""
    tree = ast.parse("def f(n): return (0, n)")
    [definition] = tree.body
    definition.body[0].value.elts[0] = ast.copy_location(ast.Constant(value), tree.body[0])  # type: ignore[attr-defined]
    variables: dict[str, Any] = {"__name__": "made"}
    exec(compile(tree, "made", "exec"), variables)
    function: Callable[..., Any] = variables["f"]
    return function


def mutual(first: int, second: int) -> Callable[..., Any]:
    """Two functions that close over each other."""

    def even(n: int) -> Any:
        return first if n == 0 else odd(n - 1)

    def odd(n: int) -> Any:
        return second if n == 0 else even(n - 1)

    return even


def unfinished(n: int) -> Callable[..., Any]:
    """What closes over a function made later, which tells it from others."""

    def early(a: int) -> int:
        return late(a)

    with pytest.raises(TypeError, match="early closes over late, which has no value yet"):
        fingerprint(early, "early")

    def late(a: int) -> int:
        return a * n

    return early


def each_value(*values: Any) -> list[Callable[..., Any]]:
    return [make(value) for value in values for make in (over, with_default, with_keyword_default, with_attribute)]


DIFFERENT: dict[str, Callable[[], list[Callable[..., Any]]]] = {
    "plain values": lambda: each_value(
        0,
        1,
        1.0,
        True,
        False,
        None,
        ...,
        0.0,
        -0.0,
        math.inf,
        math.nan,
        1j,
        "1",
        "\ud800",
        b"1",
        16**6000,
        (),
        ((),),
        (1,),
    ),
    "tuples": lambda: each_value((1, (2, 3)), ((1, 2), 3), (1, 2, 3), ("1", 2, 3), ("ab", "c"), ("a", "bc")),
    "frozensets": lambda: each_value(
        frozenset(), frozenset("a"), frozenset("ab"), frozenset([(1, frozenset([2]))]), ("a",)
    ),
    "constants": lambda: [
        of_constant(each)
        for each in (1, 1.0, True, 0.0, -0.0, (1,), frozenset([1]), frozenset([1.0]), b"", "", ..., 1j)
    ],
    "code": lambda: [
        of_source(f"def f(n, m=1): {body}", __name__="made")
        for body in (
            "return n + m",
            "return n - m",
            "return n + 1",
            "return n.real",
            "return n.imag",
            "yield n + m",
            "return lambda: n + m",
            "return lambda: n - m",
            "return lambda: (lambda: n - 2)",
            "return lambda: (lambda: n - 3)",
        )
    ],
    "parameters": lambda: [
        of_source(f"def f({parameters}): return a, b", __name__="made")
        for parameters in ("a, b", "b, a", "a, /, b", "a, *, b", "a, *b", "a, **b", "a, b=1", "a=1, b=1", "a, *, b=1")
    ],
    "handled exceptions": lambda: [
        of_source(f"def f(n):\n try:\n  return 1 / n\n except {error}:\n  return 0", __name__="made")
        for error in ("ZeroDivisionError", "TypeError")
    ],
    "modules whose globals it uses": lambda: [
        of_source("def f(n): return n + m", __name__=name) for name in ("tests.made", "made")
    ],
    "closures of closures": lambda: [over(over(over(n))) for n in (1, 2)] + [over(over(n)) for n in (1, 2)],
    "defaults of helpers": lambda: [over(helper) for helper in each_value(1, 2)],
    "functions that close over each other": lambda: [mutual(1, 2), mutual(2, 1), mutual(1, 1), mutual(2, 2)],
    "the order of what is closed over": lambda: [over((plain, over)), over((over, plain)), over((plain, plain))],
    "wrappers": lambda: [
        plain,
        scaled_by(2)(plain),
        scaled_by(3)(plain),
        scaled_by(3)(over(1)),
        scaled_by(3)(over(2)),
        scaled_by(2)(scaled_by(3)(plain)),
        scaled_by(3)(scaled_by(2)(plain)),
    ],
    "partials": lambda: [
        over(each)
        for each in (
            functools.partial(plain),
            functools.partial(plain, 1),
            functools.partial(plain, 2),
            functools.partial(plain, n=1),
            functools.partial(plain, "n", 1),
            functools.partial(over(1), 1),
            functools.partial(over(2), 1),
            functools.partial(functools.partial(over(2), 1), 1),
        )
    ],
    "methods": lambda: [Flat.area, Tall.area, over(Flat.area), over(Tall.area), Flat.area.__func__],  # type: ignore[attr-defined]
    "what an import finds": lambda: [
        over(each)
        for each in (math, operator, math.sin, math.cos, len, str.lower, str.upper, Flat, Tall, *Color, Color)
    ],
    "getters": lambda: [
        over(each)
        for each in (
            operator.attrgetter("a"),
            operator.attrgetter("b"),
            operator.itemgetter("a"),
            operator.itemgetter("a", "b"),
            operator.itemgetter(("a", "b")),
        )
    ],
    "functions with an lru_cache": lambda: [functools.lru_cache(over(1)), functools.lru_cache(over(2))],
    "namespaces of exec": lambda: (
        [
            of_source("def f(n): return n * factor", __name__=name, factor=factor)
            for factor in (1, 2)
            for name in ("made", "tests")
        ]
        + [
            of_source("def f(n): return [factor for _ in range(n)], (lambda: factor)", factor=factor)
            for factor in (1, 2)
        ]
        + [of_source("f = lambda n: g(n)\ndef g(n): return factor", factor=factor) for factor in (1, 2)]
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_functions_that_are_told_apart(what: str) -> None:
    prints = [fingerprint(function, "f") for function in DIFFERENT[what]()]
    assert len({*prints}) == len(prints), prints
    assert [fingerprint(function, "f") for function in DIFFERENT[what]()] == prints, (
        "made again, it is another function"
    )


def all_fingerprints() -> Iterator[str]:
    for make in DIFFERENT.values():
        yield from (fingerprint(function, "f") for function in make())


def test_fingerprints_are_those_of_other_processes() -> None:
    program = "from tests.test_fingerprint import all_fingerprints\nprint(*all_fingerprints())"
    for seed, pure in (("1", ""), ("2", "1")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "SHMCACHE_PURE": pure},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.stdout.split() == [*all_fingerprints()], done.stderr


class Counter:
    def __call__(self, n: int) -> int:
        return n

    def method(self, n: int) -> int:
        return n


def looks_like(function: Callable[..., Any], thing: Any) -> Any:
    return functools.update_wrapper(thing, function)


def local_class() -> type:
    class Local:
        pass

    return Local


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: over([1]), "f closes over value, a list"),
        (lambda: over((1, {2})), "f closes over value, a set"),
        (lambda: over(over([1])), "f closes over value, which closes over value, a list"),
        (lambda: over(over(over({}))), "f closes over value, which closes over value, which closes over value, a dict"),
        (lambda: over(Counter()), "f closes over value, a Counter"),
        (lambda: over(Counter().method), "f closes over value, which is bound to self, a Counter"),
        (lambda: over([].append), "f closes over value, a builtin_function_or_method"),
        (lambda: over(object()), "f closes over value, an object"),
        (lambda: over(local_class()), r"f closes over value, a class that cannot be imported \(local_class.*Local\)"),
        (lambda: over(types.ModuleType("math")), "f closes over value, a module"),
        (lambda: over(enum.Enum("Local", ["A"]).A), "f closes over value, a Local"),  # type: ignore[attr-defined]
        (lambda: over(functools.partial(plain, [])), "f closes over value, which is given argument 0, a list"),
        (lambda: over(functools.partial(plain, n=[])), "f closes over value, which is given n, a list"),
        (lambda: over(functools.partial(Counter())), "f closes over value, which calls func, a Counter"),
        (lambda: with_default([]), "f has the default scale, a list"),
        (lambda: over(with_default([])), "f closes over value, which has the default scale, a list"),
        (lambda: with_keyword_default([]), "f has the default scale, a list"),
        (lambda: with_attribute([]), "f has the attribute scale, a list"),
        (lambda: scaled_by([2])(plain), "f closes over factor, a list"),
        (lambda: scaled_by(2)(over([])), "f closes over function, which closes over value, a list"),
        (lambda: Counter().method, "f is bound to self, a Counter"),
        (lambda: Counter(), "f is a Counter"),
        (lambda: looks_like(plain, Counter()), "f is a Counter"),
        (lambda: functools.lru_cache(over([])), "f closes over value, a list"),
        (lambda: of_source("def f(n): return n * factor", factor=[2]), "f uses the global factor, a list"),
        (
            lambda: of_source("def f(n): return n * factor", factor=[2], __name__=__name__),
            "f uses the global factor, a list",
        ),
    ],
)
def test_functions_that_cannot_be_told_apart_are_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError, match=rf"^{says}: two such functions would share results; .*memoize\(name=\.\.\.\)$"):
        fingerprint(make(), "f")


def test_a_variable_without_a_value_is_refused_unless_it_is_the_function_itself() -> None:
    assert unfinished(1)(2) == 2

    def later(n: int) -> Any:
        return lambda: value

    with pytest.raises(TypeError, match=r"f closes over value, which has no value yet: two .*memoize\(name="):
        fingerprint(later, "f")
    value = 1
    assert fingerprint(later, "f")

    def method_of(base: Any) -> Any:
        class Local(base):  # type: ignore[misc]
            def method(self) -> Any:
                return super().method()

            with pytest.raises(TypeError, match="closes over __class__, which has no value yet"):
                fingerprint(method, "f")

        return Local

    method_of(Counter)


def test_a_function_that_calls_itself(cache_of_its_own: Cache) -> None:
    def power_of(base: int) -> Any:
        @cache_of_its_own.memoize()
        def power(n: int) -> int:
            return base * power(n - 1) if n else 1

        return power

    assert (power_of(2)(5), power_of(3)(5)) == (32, 243)
    assert power_of(2)(5) == 32
    assert len(cache_of_its_own) == 12


def test_memoized_functions_count_by_the_name_of_their_results(cache_of_its_own: Cache) -> None:
    memoize = cache_of_its_own.memoize
    made = [memoize()(over(1)), memoize()(over(2)), memoize(name="a")(over([])), memoize(name="b")(over([]))]
    prints = [fingerprint(over(each), "f") for each in made]
    assert len({*prints}) == 4
    assert fingerprint(over(memoize()(over(1))), "f") == prints[0]
    with pytest.raises(TypeError, match=r"f closes over value, which has the attribute \w+"):
        fingerprint(over(looks_like(made[0], lambda n: n)), "f")


@pytest.fixture
def cache_of_its_own(name: str) -> Iterator[Cache]:
    with Cache(name, max_bytes="1MB") as cache:
        yield cache
        assert cache.check() == []
        cache.unlink()


# --- programs -------------------------------------------------------------------------------------------------------
PROGRAM = """
import multiprocessing, sys
from shmcache import Cache

cache = Cache(sys.argv[1])
PLACE = {place!r}

@cache.memoize(ttl=60)
def where(number):
    return f"{{PLACE}} {{number}}"

def key_of_one():
    return where.cache_key(1)

if __name__ == "__main__":
    print(where(1), len(cache))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(key_of_one) == key_of_one()
        assert pool.apply(where, (1,)) == where(1)
    print(len(cache))
"""


def test_programs_are_told_apart_and_their_children_are_not(name: str, tmp_path: Path) -> None:
    """Each is `__main__` to itself, and `__mp_main__` to the children that it spawns."""
    said = []
    with Cache(name, max_bytes="1MB", max_entries=100):
        for place in ("here", "there"):
            program = tmp_path / f"{place}.py"
            program.write_text(PROGRAM.format(place=place))
            ended = subprocess.run([sys.executable, program, name], capture_output=True, text=True, timeout=120)
            assert ended.returncode == 0, ended.stderr
            said.append(ended.stdout.split("\n")[:2])
    assert said == [["here 1 1", "1"], ["there 1 2", "2"]]
