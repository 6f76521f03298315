"""`check_rule`: everything that altprop promises of a learning rule, asserted of one.

The model is a tiny language model with tied embedding, norms and residual blocks; the oracles are
backprop, the rule's own arithmetic called by hand, and the same pass done another way.
Shapes: N sequences, T tokens, C features, V classes.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

from altprop.conversion.convert import convert, revert, rules_off
from altprop.conversion.learned import feedback_parameters
from altprop.conversion.roles import Role
from altprop.errors import RuleError
from altprop.feedback import generator_for
from altprop.rule import AbstractBroadcast, AbstractRule, AbstractTransport, Site
from altprop.testing.contract import present, require
from altprop.testing.samples import check_samples

N, T, C, V = 4, 3, 8, 7
Matrix = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
Grads = dict[str, Tensor | None]


class _Sublayer(nn.Module):
    """`x + W₂ tanh(W₁ norm(x))`: its output is the summed residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.down(torch.tanh(self.up(self.norm(x)))))


class _Block(nn.Sequential):
    def __init__(self, depth: int) -> None:
        names = ("first", "second")[:depth]
        super().__init__(OrderedDict((name, _Sublayer()) for name in names))
        self.sublayer_outputs = names


class TinyModel(nn.Module):
    """A language model in miniature: tied embedding, two residual blocks, norm, head."""

    def __init__(self, tied: bool = True, reentrant: bool | None = None, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(_Block(depth) for _ in range(2))
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return cast(Tensor, self.head(self.norm(x)))


def _model(seed: int = 0, **options: Any) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyModel(**options).double()


def _data() -> tuple[Tensor, Tensor]:
    generator = generator_for(0, "check_rule")
    tokens = torch.randint(V, (N, T + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _loss(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    tokens, targets = data
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def _take(model: nn.Module) -> Grads:
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return grads


def _grads(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> Grads:
    _loss(model if run is None else run, _data()).backward()
    return _take(model)


def _assert_close(got: Grads, want: Grads, what: str, tolerance: float = 1e-10) -> None:
    require(got.keys() == want.keys(), f"{what}: other parameters, {got.keys() ^ want.keys()}")
    for name, a in got.items():
        b = want[name]
        require((a is None) == (b is None), f"{what}: {name} has a gradient in one of the two")
        if a is not None and b is not None:
            error = float((a - b).abs().max())
            scale = max(1.0, float(b.abs().max()))
            require(error <= tolerance * scale, f"{what}: {name} is off by {error:.2e}")


def _converted(rule: AbstractRule, seed: int = 0, **options: Any) -> TinyModel:
    return convert(_model(**options), rule, output="head", seed=seed)


def _places(model: nn.Module) -> Iterator[Role]:
    return (m for m in model.modules() if isinstance(m, Role))


def _feedback(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if n.rpartition(".")[2].startswith("B")}


def _deterministic(rule: AbstractRule) -> bool:
    if isinstance(rule, AbstractTransport):
        return not rule.noisy
    return isinstance(rule, AbstractBroadcast) and not (rule.learned or rule.period)


def _check_forward(rule: AbstractRule) -> None:
    model, (tokens, _) = _model(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = copy.deepcopy(model.state_dict())
    before = model(tokens)
    names = {name for name, _ in model.named_parameters()}
    convert(model, rule, output="head")
    require(torch.equal(before, model(tokens)), "convert changed the logits")
    with torch.no_grad():
        require(torch.equal(before, model(tokens)), "the logits differ without recording")
    require(model.head.weight is model.embed.weight, "tied weights came apart")
    feedback = copy.deepcopy(_feedback(model))
    model.load_state_dict(old)  # strict: only feedback may be missing
    for name, B in _feedback(model).items():
        if not name.endswith("B_step"):
            require(torch.equal(B, feedback[name]), f"an old state dict changed {name}")
    try:
        model.load_state_dict({k: v for k, v in old.items() if k != "norm.weight"})
    except RuntimeError:
        pass
    else:
        raise AssertionError("a state dict without norm.weight loaded: strictness was lost")
    _loss(model, _data()).backward()
    optimizer.step()
    moved = {n for n, t in model.state_dict().items() if n in old and not torch.equal(t, old[n])}
    require(moved >= {"embed.weight", "norm.weight"}, "an optimiser built before no longer steps")
    require(names <= {name for name, _ in model.named_parameters()}, "a parameter was renamed")


def _check_gradients(rule: AbstractRule) -> None:
    model = _converted(rule)
    frozen = model.blocks[0].first.up  # type: ignore[union-attr]
    cast(nn.Linear, frozen).requires_grad_(False)
    learned = {id(p) for p in feedback_parameters(model)}
    for name, grad in _grads(model).items():
        parameter = model.get_parameter(name)
        if parameter.requires_grad:
            kind = "feedback" if id(parameter) in learned else "parameter"
            grad = present(grad, f"the {kind} {name} got no gradient")
            require(bool(grad.isfinite().all()), f"{name} got a gradient that is not finite")
        else:
            require(grad is None, f"{name} is frozen but got a gradient")
    # two backward passes add up
    model, twin = _converted(rule), _converted(rule)
    first, second = _grads(twin), _grads(twin)
    for _ in range(2):
        _loss(model, _data()).backward()
    total = {n: None if g is None else g + cast(Tensor, second[n]) for n, g in first.items()}
    _assert_close(_take(model), total, "accumulation over two passes")
    with rules_off(model):
        exact = _grads(model)
    wanted = _grads(_model())
    _assert_close({n: exact[n] for n in wanted}, wanted, "rules_off against backprop", 0.0)


def _check_twice(rule: AbstractRule) -> None:
    model = _converted(rule)
    if not any(_places(model)):
        return  # nothing was replaced: plain autograd may be differentiated again
    for sources in ("all", "norm.weight"):
        model = _converted(rule)
        parameters = list(model.parameters())
        again = parameters if sources == "all" else [model.norm.weight]
        grads = torch.autograd.grad(_loss(model, _data()), parameters, create_graph=True)
        total = sum((g.square().sum() for g in grads), torch.zeros(()))
        try:
            torch.autograd.grad(total, again, allow_unused=True)
        except RuntimeError:
            continue
        raise AssertionError("differentiating twice did not raise: it would be silently wrong")


def _check_precision(rule: AbstractRule) -> None:
    model, twin = _converted(rule).float(), _converted(rule).float()
    plain = _grads(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _loss(twin, _data())
    loss.backward()
    for name, grad in _take(twin).items():
        want = cast(Tensor, plain[name])
        grad = present(grad, f"autocast: {name} has no gradient")
        require(grad.dtype == torch.float32, f"autocast: {name} has {grad}")
        size = float(torch.linalg.vector_norm(want))
        error = float(torch.linalg.vector_norm(grad - want))
        told = f"{name} is off by {error:.1e} of {size:.1e}"
        require(error <= 0.15 * size + 1e-6, f"autocast: {told}")


def _check_checkpointing(rule: AbstractRule) -> None:
    wanted = _grads(_converted(rule))
    _assert_close(_grads(_converted(rule, reentrant=False)), wanted, "non-reentrant checkpointing")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs", UserWarning)  # a probe's forward
        try:
            got = _grads(_converted(rule, reentrant=True))
        except RuleError:
            return  # refused, as it must be where it would be wrong
    _assert_close(got, wanted, "reentrant checkpointing, neither refused nor right")


def _check_seeds(rule: AbstractRule) -> None:
    one, same, other = (_converted(rule, seed=seed) for seed in (3, 3, 4))
    for name, B in _feedback(one).items():
        require(torch.equal(B, _feedback(same)[name]), f"one seed gave two feedbacks {name}")
        if not name.endswith("B_step"):
            same_draw = torch.equal(B, _feedback(other)[name])
            require(not same_draw, f"{name} does not depend on the seed")
    _grads(one)
    other.load_state_dict(one.state_dict())
    for name, B in _feedback(one).items():
        require(torch.equal(B, _feedback(other)[name]), f"{name} did not survive its state dict")
    if _deterministic(rule):
        _assert_close(_grads(one), _grads(other), "gradients after load_state_dict")


def _check_copies(rule: AbstractRule) -> None:
    require(pickle.loads(pickle.dumps(rule)) == rule, "the rule is no value: its pickle differs")
    hash(rule)
    model = _converted(rule)
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    wanted = _grads(model)
    _assert_close(_grads(twin), wanted, "deepcopy")
    _assert_close(_grads(loaded), wanted, "pickle")
    revert(model)
    plain = _model()
    types, wanted_types = (list(map(type, m.modules())) for m in (model, plain))
    require(types == wanted_types, "revert: types")
    require(model.state_dict().keys() == plain.state_dict().keys(), "revert: state-dict keys")
    for module, original in zip(model.modules(), plain.modules(), strict=True):
        require(module.__dict__.keys() == original.__dict__.keys(), "revert left an attribute")
    _assert_close(_grads(model), _grads(plain), "revert", 0.0)


def _check_compiled(rule: AbstractRule) -> None:
    torch._dynamo.reset()
    model = _model(depth=1)  # all kinds of places, in half the time
    whole = _deterministic(rule)
    run = torch.compile(model, fullgraph=whole, backend="aot_eager")
    _loss(run, _data()).backward()
    model.zero_grad()
    convert(model, rule, output="head")  # after compilation
    with warnings.catch_warnings():  # torch's compiler warns of what it does itself
        warnings.simplefilter("ignore")
        compiled = _grads(model, run)
    _assert_close(compiled, _grads(_converted(rule, depth=1)), "compiled against eager")
    torch._dynamo.reset()


def _check_transport(rule: AbstractTransport, matrix: Matrix | None) -> None:
    """Compare one map with its closed form, and with backprop where the feedback is the weight."""
    matrix = rule.matrix if matrix is None else matrix
    layer = convert(nn.Linear(5, 4).double(), rule)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 4, dtype=torch.float64)
    W, B = layer.weight, cast(Tensor | None, getattr(layer, "B", None))
    noise = None
    if rule.noisy:
        noise = rule.noise(Site("", 4, 5), generator_for(0, "", "noise", 0)).double()
    layer(x).backward(g)
    with torch.no_grad():
        wanted: dict[str, tuple[Any, Tensor]] = {
            "x": (x.grad, g @ matrix(W, B, noise)),
            "weight": (W.grad, torch.einsum("nto,nti->oi", g, x)),
            "bias": (layer.bias.grad, g.sum((0, 1))),
        }
        if rule.learned:
            B = present(B, "a rule that learns its feedback has none")
            flow = rule.feedback_gradient(W, B, wanted["weight"][1], noise)
            wanted["feedback"] = (B.grad, flow)
        for name, (got, want) in wanted.items():
            error = float((got - want).abs().max())
            require(error <= 1e-12, f"the gradient of {name} is off its closed form by {error:.1e}")
    if B is None or rule.noisy or not torch.equal(rule.matrix(W, W, None), W):
        return
    model = _converted(rule)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                cast(Tensor, module.B).copy_(module.weight)
    got_all, exact = _grads(model), _grads(_model())
    _assert_close({n: got_all[n] for n in exact}, exact, "feedback := weight against backprop")


def check_rule(
    rule: AbstractRule,
    *,
    compiled: bool = True,
    distributed: bool = True,
    matrix: Matrix | None = None,
) -> None:
    """Assert the whole contract of a transport or broadcast rule.

    Logits, state dicts, optimisers and tying survive; gradients are finite, accumulate, refuse to
    be differentiated twice, and follow the closed form; a batch's are the sum of its samples', in
    either layout; autocast, checkpointing, seeds, deepcopy, pickle, `revert`, `rules_off`,
    compilation and two data-parallel processes work.

    **Arguments:** `compiled`, whether to compile (seconds); `distributed`, whether to start two
    processes (seconds; `check_distributed` checks many rules in one pair); `matrix`, of a transport
    rule, the formula `(W, B, noise) ↦ M` as the paper has it, written without the rule (None: the
    rule's own, which then only has to be what is applied).
    **Raises:** `AssertionError`, saying what does not hold; `RuleError` for an estimator, whose
    contract is another.
    """
    if not isinstance(rule, (AbstractTransport, AbstractBroadcast)):
        raise RuleError(f"{type(rule).__name__} is neither a transport nor a broadcast rule")
    _check_forward(rule)
    _check_gradients(rule)
    check_samples(rule)
    _check_twice(rule)
    _check_precision(rule)
    _check_checkpointing(rule)
    _check_seeds(rule)
    _check_copies(rule)
    if isinstance(rule, AbstractTransport):
        _check_transport(rule, matrix)
    if compiled:
        _check_compiled(rule)
    if distributed:
        check_distributed([rule])


def check_distributed(rules: Sequence[AbstractRule]) -> None:
    """Assert, in two gloo processes, that gradients equal those of the joint batch on every rank.

    Of learned feedback too, and of halves as of unequal parts. Feedback must be equal on both
    ranks. **Raises:** whatever a rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(str(Path(folder) / "store"), list(rules)), nprocs=2)


def _rank(rank: int, store: str, rules: list[AbstractRule]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    try:
        for rule in rules:
            _compare_ranks(rule, rank)
    finally:
        torch.distributed.destroy_process_group()


def _compare_ranks(rule: AbstractRule, rank: int) -> None:
    single, local = _converted(rule), _converted(rule)
    parallel = nn.parallel.DistributedDataParallel(local)
    tokens, targets = _data()
    for first in (N // 2, 1):  # a reduction that stalls shows in the second pass
        part = slice(first) if rank == 0 else slice(first, N)
        joint = _grads(single)
        (_loss(parallel, (tokens[part], targets[part])) * (2 * len(tokens[part]) / N)).backward()
        got = _take(local)
        what = f"{rule} in two processes"
        _assert_close(got, joint, what)
        for name, value in {**got, **_feedback(local)}.items():
            value = present(value, f"{what}: {name} has no gradient")
            pair = [torch.empty_like(value) for _ in range(2)]
            torch.distributed.all_gather(pair, value.contiguous())
            require(torch.equal(*pair), f"{what}: {name} differs between the ranks")
