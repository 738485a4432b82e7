"""The lines of docs/dropin/ inside the trainers' own files: `pytest tests/test_trainers.py --trainers PATH [--time -s]`.

PATH holds checkouts (git clone, any commit that contains the pinned one). From each file the loss block is cut out by its
structure, run as it is and with the page's edits, and loss, gradient and every logged number are compared. --time prints
the CPU time that both take and the memory they allocate, on one thread, with all log lines.
"""

import ast
import time
from contextlib import contextmanager
from statistics import median

import pytest
import torch

import afd_fast
from tests.trainers import (
    SCALE,
    TRAINERS,
    Data,
    cosmos,
    cut,
    edited,
    find,
    flow_factory,
    page_edits,
    rlinf,
    rlinf_class,
    source,
    unirl,
)
from tests.trainers import astrolabe as astrolabe_names

VARIANTS = [  # (page, names of its block)
    *((t.page, t.env) for t in TRAINERS),
    ("astrolabe", lambda d: astrolabe_names(d, select=True)), ("flow_factory", lambda d: flow_factory(d, kl=False)),
    ("unirl", lambda d: unirl(d, adaptive=False)), ("rlinf", lambda d: rlinf(d, gather="chunk_level")),
    ("rlinf", lambda d: rlinf(d, weight="constant")),
]  # fmt: skip
PAGE = {t.page: t for t in TRAINERS}
IDS = [f"{page}-{i}" if i >= len(TRAINERS) else page for i, (page, _) in enumerate(VARIANTS)]


def text_of(trainer, request):
    folder = request.config.getoption("--trainers")
    text = folder and source(trainer, folder)
    if not text:
        pytest.skip(
            f"git clone https://github.com/{trainer.repository} (commit {trainer.commit}), then --trainers FOLDER_OF_CLONES"
        )
    return text


def program(trainer, folder, statements):
    """The statements, compiled, as a function of the names they read: (names they leave)."""
    code = compile(ast.fix_missing_locations(ast.Module(statements, [])), trainer.file, "exec")
    extra = {"torch": torch, "afd_fast": afd_fast}
    methods = None
    if trainer.page == "rlinf":
        methods, extra["masked_mean"] = rlinf_class(trainer, folder)

    def call(env):
        space = env | extra
        if methods:
            space["self"] = methods()
            space["self"].cfg = env["self"].cfg
        exec(code, space)
        return space

    return call


def values(x):
    return torch.as_tensor(x, dtype=torch.float64).detach() if not isinstance(x, torch.Tensor) else x.detach().double()


def run(trainer, call, data, env):
    """(loss, gradient, terms) in float64."""
    space = call(env(data))
    loss = eval(trainer.loss, {}, space)
    if data.v.grad is None:
        (loss * SCALE).backward()
    terms = {name: values(x) for name, x in eval(trainer.terms, {}, space).items()}
    return values(loss), data.v.grad.double(), terms


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("page,env", VARIANTS, ids=IDS)
def test_float64_equals_the_trainers_lines(page, env, request):
    trainer = PAGE[page]
    theirs, ours = edited(trainer, text_of(trainer, request))
    folder = request.config.getoption("--trainers")
    (a, g, logged), (b, h, terms) = (
        run(trainer, program(trainer, folder, x), Data(trainer, torch.float64), env) for x in (theirs, ours)
    )
    assert abs(a - b) <= 1e-9 * abs(a) and g.norm() > 0 and relative(h, g) <= 1e-9
    assert terms.keys() == logged.keys()
    for name, x in logged.items():
        assert terms[name].shape == x.shape, name
        torch.testing.assert_close(terms[name], x, rtol=1e-9, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("page,env", VARIANTS, ids=IDS)
def test_low_precision_is_closer_to_float64_than_the_trainers_lines(page, env, dtype, request):
    trainer = PAGE[page]
    folder = request.config.getoption("--trainers")
    theirs, ours = (program(trainer, folder, x) for x in edited(trainer, text_of(trainer, request)))
    exact, exact_grad, exact_terms = run(trainer, theirs, Data(trainer, dtype, wide=True), env)
    a, g, logged = run(trainer, theirs, Data(trainer, dtype), env)
    b, h, terms = run(trainer, ours, Data(trainer, dtype), env)
    worse = lambda x: x.nan_to_num(
        nan=torch.inf
    )  # in float16 some of the trainers overflow with this scale of the loss
    print(f"{page} {dtype}: gradient error {relative(h, exact_grad):.1e}, the trainer's {relative(g, exact_grad):.1e}")
    assert (h - exact_grad).norm() <= max(
        worse((g - exact_grad).norm()), torch.finfo(dtype).eps / 2 * exact_grad.norm()
    )
    subnormal = (
        2**-25 * h.numel() ** 0.5 if dtype == torch.float16 else 0.0
    )  # half a step below float16's normal numbers
    assert (h - exact_grad).norm() <= (1e-6 if dtype == torch.float32 else 2e-3) * exact_grad.norm() + subnormal
    assert terms.keys() == logged.keys()
    for name, x in exact_terms.items() | {("the loss", exact)}:
        mine, their = (found.get(name, default) for found, default in ((terms, b), (logged, a)))
        assert (mine - x).abs().max() <= max(worse((their - x).abs().max()), 2e-6 * x.abs().max() + 1e-6), name


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: t.page)
def test_no_later_line_reads_a_name_that_is_gone(trainer, request):
    text = text_of(trainer, request)
    theirs, ours = edited(trainer, text)
    stored = lambda body: {
        n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    gone = stored(theirs) - stored(ours)
    block = cut(trainer, text)
    end = block.body[block.last].end_lineno
    function = max(
        (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.lineno < end <= n.end_lineno),
        key=lambda n: n.lineno,
    )
    later = sorted(
        (n.lineno, n.col_offset, n) for n in ast.walk(function) if isinstance(n, ast.Name) and n.lineno > end
    )
    first = {}
    for *_, n in later:
        first.setdefault(n.id, n)
    assert gone and not [n for n in gone if n in first and not isinstance(first[n].ctx, ast.Store)]


def test_cosmos_columns_keep_their_credit(request):
    """The file's advantages are [B, 1]: its lines give every sample the mean r, the call each its r."""
    trainer, folder = PAGE["cosmos_rl"], request.config.getoption("--trainers")
    theirs, ours = (program(trainer, folder, x) for x in edited(trainer, text_of(trainer, request)))
    column = lambda d: cosmos(d, column=True)
    _, intended, _ = run(trainer, theirs, Data(trainer, torch.float64), cosmos)
    _, literal, _ = run(trainer, theirs, Data(trainer, torch.float64), column)
    _, mine, _ = run(trainer, ours, Data(trainer, torch.float64), column)
    assert relative(mine, intended) <= 1e-9 and relative(literal, intended) > 0.1


@contextmanager
def allocations():
    """A list that receives the peak of the memory allocated inside, in MiB."""
    found = []
    with torch.profiler.profile(profile_memory=True) as profile:
        yield found
    sizes = sorted(
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    total = peak = 0
    for _, size in sizes:
        total += size
        peak = max(peak, total)
    found.append(peak / 2**20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: t.page)
def test_time(trainer, dtype, request):
    if not request.config.getoption("--time"):
        pytest.skip("--time")
    folder = request.config.getoption("--trainers")
    data = Data(trainer, dtype)

    def step(call):
        env, data.v.grad = trainer.env(data), None
        start = time.process_time()
        space = call(env)
        if data.v.grad is None:
            eval(trainer.loss, {}, space).backward()
        return time.process_time() - start

    calls = [program(trainer, folder, statements) for statements in edited(trainer, text_of(trainer, request))]
    rounds = [[step(call) for call in calls] for _ in range(21)]  # in turn: other processes slow both down
    a, b = (1e3 * median(times) for times in zip(*rounds))
    peaks = []
    for call in calls:
        data.v.grad = None  # freed outside of what is measured
        with allocations() as peak:
            step(call)
        peaks += peak
    print(
        f"\n| {trainer.page} | {str(dtype)[6:]} | {a:.1f} ms | {b:.2f} ms | {a / b:.1f}x | {peaks[0]:.1f} MiB | {peaks[1]:.1f} MiB |"
    )


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda t: t.page)
def test_the_page_is_whole(trainer):
    """Without checkouts: the lines parse, call the function of the page and name its commit."""
    edits = page_edits(trainer)
    calls = [n for e in edits for n in ast.walk(ast.parse(e.code)) if isinstance(n, ast.Call)]
    named = [c for c in calls if ast.unparse(c.func) == f"afd_fast.dropin.{trainer.page}"]
    assert len(edits) == len(trainer.edits) and len(named) == 1 and hasattr(afd_fast.dropin, trainer.page)


def test_a_block_is_found_by_its_structure():
    text = "def f():\n    a = 1\n    b = a\n    c, d = b, a\n    return c\n"
    trainer = TRAINERS[0]._replace(start="b =", end="c, d =", edits=(("b =", "b ="),))
    block = cut(trainer, text)
    assert [ast.unparse(s) for s in block.body[block.first : block.last + 1]] == [
        "b = a",
        ast.unparse(ast.parse("c, d = b, a")),
    ]
    assert find(block.body, "nothing") is None
    with pytest.raises(AssertionError, match="has no block"):
        cut(trainer, text.replace("b = a", "e = a"))
