"""The objectives: cross-entropy's semantics, the gradient g(z) − t, safe numbers, and the fused form."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_dl import objectives
from efficient_dl.config.schema import OBJECTIVE_WORDS
from efficient_dl.errors import ConfigError
from efficient_dl.objectives import (
    CROSS_ENTROPY,
    OBJECTIVES,
    ExpFormula,
    Formula,
    LinearFormula,
    MatchingFormula,
    Pow3Formula,
    RescaledSquareFormula,
    SquentropyFormula,
    linear_objective,
    make_objective,
    objective,
)
from efficient_dl.training.task import evaluate_batch, task_for

MATCHING: list[MatchingFormula] = [LinearFormula(), ExpFormula(), ExpFormula(alpha=0.5), Pow3Formula()]
FORMULAS: list[Formula] = [CROSS_ENTROPY, *MATCHING, SquentropyFormula(), RescaledSquareFormula(2.0, 3.0)]
formulas = pytest.mark.parametrize("formula", FORMULAS, ids=repr)
matching = pytest.mark.parametrize("formula", MATCHING, ids=repr)


def of_one(formula: Formula, z: Tensor, c: int) -> Tensor:
    """The loss of one row and class, written from its definition."""
    others = torch.cat((z[:c], z[c + 1 :]))
    log_softmax = (z[c].exp() / z.exp().sum()).log()
    match formula:
        case LinearFormula():
            return ((z - torch.eye(len(z), dtype=z.dtype)[c]) ** 2).sum() / 2
        case ExpFormula(alpha=alpha):
            return (alpha or 1 / len(z)) * z.exp().sum() - z[c]
        case Pow3Formula(alpha=alpha):
            return alpha * (z**4).sum() / 4 - z[c]
        case SquentropyFormula():
            return -log_softmax + (others**2).sum() / (len(z) - 1)
        case RescaledSquareFormula(k=k, m=m):
            return (k * (z[c] - m) ** 2 + (others**2).sum()) / len(z)
        case _:
            return -log_softmax


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, object]]:
    """Logits, targets and arguments of cross_entropy, of every kind it takes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    classes = draw(st.integers(2, 6))
    shape = draw(st.sampled_from([(classes,), (4, classes), (3, classes, 2), (2, classes, 2, 3)]))
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 3.0]))
    arguments: dict[str, object] = {"reduction": draw(st.sampled_from(["none", "mean", "sum"]))}
    if draw(st.booleans()):
        arguments["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64)
    arguments["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    axis = 0 if len(shape) == 1 else 1
    if draw(st.booleans()):
        target = torch.rand(shape, generator=generator, dtype=torch.float64)
        if draw(st.booleans()):
            target = target / target.sum(axis, keepdim=True)
    else:
        target = torch.randint(classes, shape[:axis] + shape[axis + 1 :], generator=generator)
        arguments["ignore_index"] = draw(st.sampled_from([-100, 1]))
    return logits, target, arguments


@given(problems())
@settings(max_examples=80, deadline=None)
def test_the_arguments_mean_what_they_mean_to_torchs_cross_entropy(
    problem: tuple[Tensor, Tensor, dict[str, object]],
) -> None:
    logits, target, arguments = problem
    expected = F.cross_entropy(logits, target, **arguments)  # type: ignore[arg-type]
    found = objective(CROSS_ENTROPY, logits, target, **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, equal_nan=True)


@formulas
@given(problem=problems())
@settings(max_examples=10, deadline=None)
def test_every_loss_treats_its_arguments_as_cross_entropy_does(
    formula: Formula, problem: tuple[Tensor, Tensor, dict[str, object]]
) -> None:
    logits, target, arguments = problem
    axis = 0 if logits.dim() == 1 else 1
    rows = logits.movedim(axis, -1).reshape(-1, logits.shape[axis])
    classes = range(rows.shape[1])
    losses = torch.stack([torch.stack([of_one(formula, row, c) for c in classes]) for row in rows])
    expected = (coefficients_of(target, rows.shape, axis, arguments) * losses).sum(-1)
    each = objective(formula, logits, target, **{**arguments, "reduction": "none"})  # type: ignore[arg-type]
    torch.testing.assert_close(each.reshape(-1), expected)
    total = objective(formula, logits, target, **{**arguments, "reduction": "sum"})  # type: ignore[arg-type]
    torch.testing.assert_close(total, expected.sum())


def coefficients_of(target: Tensor, shape: torch.Size, axis: int, arguments: dict[str, object]) -> Tensor:
    """Σ_c w_c t_c loss_c: the w_c t_c of every row, smoothed, 0 where ignored."""
    classes, smooth = shape[1], float(arguments["label_smoothing"])  # type: ignore[arg-type]
    weight = arguments.get("weight", torch.ones(classes, dtype=torch.float64))
    assert isinstance(weight, Tensor)
    if target.is_floating_point():
        shares = target.movedim(axis, -1).reshape(shape)
        kept = torch.ones(shape[0], 1, dtype=torch.float64)
    else:
        shares = F.one_hot(target.reshape(-1), classes).double()
        kept = (target.reshape(-1, 1) != arguments["ignore_index"]).double()
    return weight * ((1 - smooth) * shares + smooth / classes) * kept


@matching
def test_the_gradient_is_g_of_z_minus_t(formula: MatchingFormula) -> None:
    z = (3 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    t = torch.rand(5, 7, dtype=torch.float64).softmax(-1)
    objective(formula, z, t, reduction="sum").backward()
    torch.testing.assert_close(z.grad, formula.link(z.detach()) - t)
    y = torch.randint(7, (5,))
    (grad,) = torch.autograd.grad(objective(formula, z, y, reduction="sum"), z)
    torch.testing.assert_close(grad, formula.link(z.detach()) - F.one_hot(y, 7))


@formulas
def test_first_and_second_derivatives_agree_with_finite_differences(formula: Formula) -> None:
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    t = torch.rand(3, 4, dtype=torch.float64).softmax(-1)
    assert torch.autograd.gradcheck(lambda z: objective(formula, z, t), (z,))
    assert torch.autograd.gradgradcheck(lambda z: objective(formula, z, t), (z,))


@pytest.mark.parametrize("formula", [ExpFormula(limit=2.0), Pow3Formula(limit=2.0)], ids=repr)
def test_beyond_the_clamp_the_gradient_is_still_the_loss_s(formula: MatchingFormula) -> None:
    z = torch.tensor([[3.0, -5.0, 1.0], [8.0, 2.5, -2.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: objective(formula, z, torch.tensor([0, 1])), (z,))


@formulas
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(formula: Formula, dtype: torch.dtype) -> None:
    z = (2 * torch.randn(64, 10)).to(dtype).requires_grad_()
    y = torch.randint(10, (64,))
    found = objective(formula, z, y)
    assert found.dtype == torch.float32
    assert torch.equal(found, objective(formula, z.float(), y))
    (grad,) = torch.autograd.grad(found, z)
    assert grad.dtype == dtype and bool(grad.isfinite().all())


@formulas
def test_large_logits_give_finite_losses_and_gradients(formula: Formula) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 88.0]], requires_grad=True)
    loss = objective(formula, z, torch.tensor([1, 1]))
    loss.backward()
    assert bool(loss.isfinite()) and z.grad is not None and bool(z.grad.isfinite().all())


@formulas
def test_a_nan_in_the_logits_reaches_the_loss(formula: Formula) -> None:
    assert bool(objective(formula, torch.tensor([[0.0, float("nan")]]), torch.tensor([0])).isnan())


@formulas
def test_probabilities_are_a_distribution_that_prefers_the_largest_logit(formula: Formula) -> None:
    z = 3 * torch.randn(50, 9, dtype=torch.float64)
    p = formula.probabilities(z)
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=torch.float64))
    assert bool((p > 0).all())
    sure = z.amax(-1) > 1
    assert torch.equal(p.argmax(-1)[sure], z.argmax(-1)[sure])
    torch.testing.assert_close(formula.log_probabilities(z), p.log())


@matching
def test_probabilities_at_the_optimum_are_the_targets(formula: MatchingFormula) -> None:
    t = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = objective(formula, z, t)
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close(formula.probabilities(z.detach()), t, atol=1e-3, rtol=0)


def test_a_module_takes_the_place_of_torchs() -> None:
    weight = torch.rand(5)
    arguments = {"ignore_index": 2, "reduction": "sum", "label_smoothing": 0.1}
    theirs = nn.CrossEntropyLoss(weight, **arguments)  # type: ignore[arg-type]
    z, y = torch.randn(8, 5, 3), torch.randint(5, (8, 3))
    for name in OBJECTIVES:
        ours = make_objective(name, weight=weight, **arguments)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        copy.deepcopy(ours).to(torch.float64).load_state_dict(theirs.state_dict())
        assert ours.probabilities(z, axis=1).sum(1).allclose(torch.ones(8, 3))
    torch.testing.assert_close(
        make_objective("cross-entropy", weight=weight, **arguments)(z, y), theirs(z, y)
    )
    torch.testing.assert_close(
        objectives.ExpGBLoss(alpha=0.3)(z, y), objectives.exp_gb(z, y, alpha=0.3), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "average"}, "no such reduction"),
        ({"label_smoothing": 1.5}, "from 0 to 1"),
        ({"weight": torch.ones(3)}, "class weights of shape"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objectives.linear(torch.randn(2, 4), torch.tensor([0, 1]), **arguments)  # type: ignore[arg-type]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(2, 5\)"):
        objectives.linear(torch.randn(2, 4, 5), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 2"):
        objectives.squentropy(torch.randn(2, 1), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="did you mean expgb"):
        make_objective("exp-gb")


# ------------------------------------------------------------------ fused
@formulas
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
@pytest.mark.parametrize("targets", ["classes", "probabilities"])
def test_the_fused_loss_and_its_gradients_are_the_unfused(
    formula: Formula, chunk_rows: int, targets: str
) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    projection = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(7, dtype=torch.float64)
    target = torch.randint(7, (3, 4)) if targets == "classes" else torch.rand(3, 4, 7).softmax(-1).double()
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": "mean"}
    if targets == "classes":
        options["ignore_index"] = 3
    logits = F.linear(hidden, projection, bias).flatten(0, 1)
    flat = target.flatten(0, 1)
    expected = objective(formula, logits, flat, **options)  # type: ignore[arg-type]
    found = linear_objective(
        formula,
        hidden,
        projection,
        target,
        bias,
        chunk_rows=chunk_rows,
        **options,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(found, expected)
    inputs = (hidden, projection, bias)
    wanted = torch.autograd.grad(2 * expected, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(2 * found, inputs, retain_graph=True), wanted)
    torch.testing.assert_close(torch.autograd.grad(2 * found, inputs), wanted)  # nothing was used up
    with torch.no_grad():
        torch.testing.assert_close(
            linear_objective(formula, hidden, projection, target, bias, chunk_rows=chunk_rows, **options),  # type: ignore[arg-type]
            expected,
        )


def test_the_fused_loss_under_autocast_is_near_the_unfused() -> None:
    hidden = torch.randn(32, 16, requires_grad=True)
    projection = torch.randn(50, 16, requires_grad=True)
    target = torch.randint(50, (32,))
    with torch.autocast("cpu", torch.bfloat16):
        expected = objective(CROSS_ENTROPY, F.linear(hidden, projection), target)
        found = linear_objective(CROSS_ENTROPY, hidden, projection, target, chunk_rows=10)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(one, (hidden, projection)) for one in (found, expected)]
    assert all(one.dtype == torch.float32 for one in grads[0])
    torch.testing.assert_close(grads[0], grads[1], atol=2e-3, rtol=2e-2)


def test_the_fused_loss_computes_only_the_gradients_that_are_needed() -> None:
    hidden, projection = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    loss = linear_objective(ExpFormula(), hidden, projection, torch.randint(5, (4,)), chunk_rows=2)
    loss.backward()
    assert hidden.grad is None and projection.grad is not None


def test_the_fused_loss_saves_no_tensor_of_rows_times_classes() -> None:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    hidden = torch.randn(512, 4, requires_grad=True)
    projection = torch.randn(300, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_objective(Pow3Formula(), hidden, projection, torch.randint(300, (512,)), chunk_rows=16)
    assert max(sizes) <= 512 * 300 // 16


def test_a_fused_loss_for_each_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mean \| sum"):
        linear_objective(
            CROSS_ENTROPY, torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), reduction="none"
        )


# ------------------------------------------------------------------ in runs
def test_the_settings_know_every_objective() -> None:
    assert tuple(OBJECTIVES) == OBJECTIVE_WORDS


@pytest.mark.parametrize("name", OBJECTIVE_WORDS)
def test_val_loss_is_nats_of_the_objective_s_own_probabilities(name: str) -> None:
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    task = task_for("tokens", name)
    found = evaluate_batch(task, logits, targets)
    p = make_objective(name).probabilities(logits).gather(-1, targets[..., None])
    torch.testing.assert_close(found["loss"], -p.double().log().mean(), atol=1e-5, rtol=1e-5)
    if name == "cross-entropy":
        assert found.keys() == {"loss"}
    else:
        assert float(found["objective"]) == pytest.approx(float(task.loss(logits, targets)))
        assert "accuracy" in evaluate_batch(task_for("images", name), logits[0], targets[0])
