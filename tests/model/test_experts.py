"""Experts, their router and their losses equal naive loops, and a clip's way is its own."""

import math
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.model.small import SIZE, small_inputs, small_params
from vatt.checkpoint import build, build_classifier, load, save, without_memory
from vatt.config import ExpertsParams, ModelParams, SizeParams
from vatt.flops import expert_weights, multimodal_flops
from vatt.model.experts import (
    ExpertLinear,
    Experts,
    Routing,
    grouped_linear,
    has_experts,
    most_choices,
    noting_routings,
    routing_losses,
    specialisation,
)
from vatt.model.experts import _parts as experts_parts
from vatt.model.transformer import MLP, Encoder, ExpertBlock, layer_norm
from vatt.model.vatt import initialise

WIDE = SizeParams(depth=2, dim=6, mlp_dim=10, heads=2, head_dim=3)
SHARED = [("video", "audio", "text")]


def settings(**changes) -> ExpertsParams:
    return ExpertsParams.model_validate({"number": 4} | changes)


def make(**changes) -> Experts:
    torch.manual_seed(0)
    experts = Experts(WIDE, settings(**changes), dropout=0.0)
    initialise(experts)
    for layer in (experts.hidden, experts.out):
        torch.nn.init.normal_(layer.bias)
    torch.nn.init.normal_(experts.router.weight)
    return experts.double()


def some_tokens(clips=3, number=7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(clips, number, WIDE.dim, generator=generator, dtype=torch.float64)
    real = torch.ones(clips, number, dtype=torch.bool)
    real[1, 4:] = False
    return tokens, real


def naive(experts: Experts, tokens: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Clip by clip, choice by choice, token by token; and how many choices found no room."""
    params, answer, dropped = experts.params, torch.zeros_like(tokens), 0
    for clip in range(len(tokens)):
        places = [place for place in range(tokens.shape[1]) if real[clip, place]]
        scores = (tokens[clip] @ experts.router.weight.T).softmax(-1)
        if params.batch_priority:
            places.sort(key=lambda place: -scores[place].max().item())
        room = len(places) * params.top_k
        if params.capacity is not None:
            room = math.ceil(len(places) * params.top_k * params.capacity / params.number)
        taken = [0] * params.number
        for choice in range(params.top_k):
            for place in places:
                number = int(scores[place].argsort(descending=True)[choice])
                if taken[number] == room:
                    dropped += 1
                    continue
                taken[number] += 1
                hidden = experts.hidden.weight[number] @ tokens[clip, place]
                hidden = torch.nn.functional.gelu(hidden + experts.hidden.bias[number])
                found = experts.out.weight[number] @ hidden + experts.out.bias[number]
                answer[clip, place] += scores[place, number] * found
    return answer, dropped


@pytest.mark.parametrize("batch_priority", [True, False])
@pytest.mark.parametrize("capacity", [None, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_equal_a_loop_over_clips_choices_and_tokens(top_k, capacity, batch_priority):
    experts = make(top_k=top_k, capacity=capacity, batch_priority=batch_priority)
    tokens, real = some_tokens()
    answer, routing = experts(tokens, real)
    expected, dropped = naive(experts, tokens, real)
    torch.testing.assert_close(answer, expected)
    found = Routing.of(routing)
    assert found.tokens.tolist() == [7, 4, 7]
    assert found.dropped.sum() == dropped and (dropped > 0) == (capacity in (0.3, 1.0))
    scores = (tokens @ experts.router.weight.T).softmax(-1)
    for clip in range(3):
        kept = scores[clip][real[clip]]
        entropy = -(kept * kept.log()).sum()
        torch.testing.assert_close(found.probabilities[clip], kept.sum(0))
        torch.testing.assert_close(found.entropy[clip], entropy)
        chosen = torch.bincount(kept.topk(top_k).indices.flatten(), minlength=4)
        assert torch.equal(found.chosen[clip], chosen.double())


def test_gradients_equal_those_of_the_loop():
    experts = make(top_k=2, capacity=1.0)
    tokens, real = some_tokens()
    found = [
        torch.autograd.grad(answer.square().sum(), list(experts.parameters()))
        for answer in (experts(tokens, real)[0], naive(experts, tokens, real)[0])
    ]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("ends", [[5, 40, 40, 71], [0, 0, 60, 60], [70, 71, 71, 71]])
def test_products_in_bf16_are_those_of_each_group_and_of_few_sizes(ends):
    torch.manual_seed(0)
    shapes = ((71, 16), (4, 8, 16), (4, 8))
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    exact = [one.detach().double().requires_grad_() for one in inputs]
    found, expected = (grouped_linear(*given, torch.tensor(ends)) for given in (inputs, exact))
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    slope = torch.randn(71, 8)
    gradients = [
        torch.autograd.grad(answer, given, slope.to(answer.dtype))
        for answer, given in ((found, inputs), (expected, exact))
    ]
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=2e-2, atol=5e-2)
    rows = torch.empty(4096, 1, dtype=torch.bfloat16)
    sizes = set()
    for end in range(1, 4096):
        ((part, around),) = experts_parts(rows, torch.tensor([end]))
        assert around.start <= part.start and part.stop <= around.stop <= 4096
        assert part.stop - part.start <= around.stop - around.start <= 1.25 * end + 16
        sizes.add(around.stop - around.start)
    assert len(sizes) <= 40


def test_an_exported_graph_asks_all_experts_and_answers_the_same(monkeypatch):
    experts, (tokens, real) = make(top_k=2, capacity=0.5), some_tokens()
    expected = experts(tokens, real)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(experts(tokens, real), expected)


def test_an_expert_without_rows_gets_a_gradient_of_zero():
    torch.manual_seed(0)
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 4])  # nothing for the second; the last row is nobody's
    answer = grouped_linear(rows, weight, bias, ends)
    assert (answer[4] == 0).all()
    assert torch.autograd.gradcheck(grouped_linear, (rows, weight, bias, ends))
    answer.sum().backward()
    assert (weight.grad[1] == 0).all() and (bias.grad[1] == 0).all() and (rows.grad[4] == 0).all()
    torch.library.opcheck(grouped_linear, (rows, weight, bias, ends))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_one_expert_is_the_dense_layer(kind):
    torch.manual_seed(0)
    experts, dense = (
        Experts(WIDE, settings(number=1), dropout=0.0),
        MLP(WIDE, bias=True, dropout=0.0),
    )
    initialise(experts), initialise(dense)
    torch.nn.init.normal_(dense.hidden.bias)
    with torch.no_grad():
        for name in ("hidden", "out"):
            for part in ("weight", "bias"):
                getattr(getattr(experts, name), part)[0] = getattr(getattr(dense, name), part)
    tokens = torch.randn(3, 7, WIDE.dim)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        answer, _ = experts(tokens)
        torch.testing.assert_close(answer, dense(tokens).float(), rtol=1e-6, atol=1e-6)


def test_a_model_of_one_expert_is_the_dense_model():
    dense = build(small_params(backbone="agnostic")).eval()
    sparse = build(small_params(backbone="agnostic", experts={"number": 1})).eval()
    state = sparse.state_dict()
    for name, value in dense.state_dict().items():
        state[name] = value[None] if value.dim() < state[name].dim() else value
    sparse.load_state_dict(state)
    left, right = dense(*small_inputs()), sparse(*small_inputs())
    for name in ("video_va", "audio_va", "video_vt", "text_vt"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name))


def test_initial_weights_of_an_expert_are_those_of_a_layer_of_its_own():
    torch.manual_seed(0)
    layer = ExpertLinear(4, 300, 200)
    initialise(layer)
    limit = math.sqrt(6 / 500)
    for weight in layer.weight:
        assert weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_a_clip_alone_goes_the_way_that_it_goes_in_a_batch(capacity):
    experts, (tokens, real) = make(top_k=2, capacity=capacity), some_tokens()
    answer, routing = experts(tokens, real)
    for clip in range(3):
        alone = experts(tokens[clip : clip + 1], real[clip : clip + 1])
        torch.testing.assert_close(alone, (answer[clip : clip + 1], routing[clip : clip + 1]))


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_more_pads_change_nothing(capacity):
    experts = {"number": 3, "top_k": 2, "capacity": capacity}
    model = build(small_params(experts=experts, dropout=0.0)).double().eval()
    text = small_inputs()[2]
    longer = torch.nn.functional.pad(text, (0, 5))
    with noting_routings() as noted:
        torch.testing.assert_close(model(text=text).text_features, model(text=longer).text_features)
    torch.testing.assert_close(noted[0], noted[1])
    assert Routing.of(noted[0]).tokens.tolist() == (1 + (text != 0).sum(-1)).flatten().tolist()


def test_blocks_with_experts_are_counted_back_from_the_last_but_one():
    def numbers(depth, every):
        return [n for n in range(1, depth + 1) if has_experts(n, depth, settings(every=every))]

    assert numbers(4, 2) == [1, 3] and numbers(12, 2) == [1, 3, 5, 7, 9, 11]
    assert numbers(4, 1) == [1, 2, 3] and numbers(6, 4) == [1, 5] and numbers(2, 2) == [1]
    assert not has_experts(1, 4, None)


def test_the_first_tokens_alone_are_those_of_all():
    encoder = Encoder(SizeParams(**SIZE), dropout=0.0, experts=settings()).double()
    initialise(encoder)
    tokens = torch.randn(3, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(encoder(tokens, wanted=1), encoder(tokens)[:, :1])


def test_a_router_is_not_rounded_under_bf16_and_experts_are():
    experts, (tokens, real) = make().float(), some_tokens()
    tokens = tokens.float()
    with torch.autocast("cpu", torch.bfloat16):
        _, routing = experts(tokens, real)
        rows = experts.hidden(tokens.flatten(0, 1), torch.tensor([6, 12, 18, 21]))
    assert rows.dtype == torch.bfloat16 and routing.dtype == torch.float32
    torch.testing.assert_close(routing, experts(tokens, real)[1], rtol=0, atol=0)


def make_block(**changes) -> ExpertBlock:
    torch.manual_seed(0)
    size = SizeParams(**SIZE)
    block = ExpertBlock(size, settings(**changes), norm=layer_norm, scale=0.5, dropout=0.0)
    initialise(block)
    return block


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_a_block_compiles_as_one_graph(capacity):
    block = make_block(top_k=2, capacity=capacity)
    compiled = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    tokens = torch.randn(3, 5, 12, requires_grad=True)
    results = []
    for forward in (block.forward, compiled):
        answer, _, routing = forward(tokens)
        loss = answer.square().sum() + routing.square().sum()
        results.append([answer, routing, *torch.autograd.grad(loss, [tokens, *block.parameters()])])
    torch.testing.assert_close(results[0], results[1])


def test_a_checkpointed_block_notes_its_routing_once():
    size, gradients = SizeParams(**SIZE), []
    for again in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(size, dropout=0.1, experts=settings())
        initialise(encoder)
        tokens = torch.randn(3, 5, 12)
        for block in encoder.blocks if again else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        torch.manual_seed(1)
        with noting_routings() as noted:
            answer = encoder(tokens)
            loss = answer.square().sum() + noted[0].square().sum()
            loss.backward()
        assert len(noted) == 1
        gradients.append([weight.grad for weight in encoder.blocks.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def naive_losses(numbers, params):
    """The formulas of the papers, in plain Python: a list of tokens' probabilities by modality."""

    def entropy(p):
        return -sum(one * math.log(one) for one in p if one > 0)

    def mean(rows):
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    every = [row for rows in numbers.values() for row in rows]
    shares = [0.0] * params.number
    for row in every:
        for place in sorted(range(params.number), key=lambda n: -row[n])[: params.top_k]:
            shares[place] += 1 / (params.top_k * len(every))
    balance = params.number * sum(f * p for f, p in zip(shares, mean(every), strict=True))
    local = {name: sum(map(entropy, rows)) / len(rows) for name, rows in numbers.items()}
    used = {name: entropy(mean(rows)) for name, rows in numbers.items()}
    missing = sum(max(0.0, math.log(params.least_experts) - one) for one in used.values())
    total = params.balance_weight * balance + params.local_weight * sum(local.values())
    return total + params.global_weight * missing, balance, local, used


@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_equal_the_papers_formulas(top_k):
    params = settings(top_k=top_k, least_experts=3.5, local_weight=0.3, global_weight=0.7)
    torch.manual_seed(0)
    experts = Experts(WIDE, params, dropout=0.0).double()
    initialise(experts)
    sums, rows = {}, {}
    for name, sharpness in (("video", 1), ("audio", 4), ("text", 20)):
        tokens = sharpness * torch.randn(3, 5, WIDE.dim, dtype=torch.float64)
        sums[name] = experts(tokens)[1].sum(0)[None]  # of one block
        rows[name] = experts.router(tokens).softmax(-1).flatten(0, 1).tolist()
    found = routing_losses(sums, SHARED, params)
    total, balance, local, used = naive_losses(rows, params)
    assert found.total.item() == pytest.approx(total)
    assert found.metrics["experts.balance"].item() == pytest.approx(balance)
    for name in rows:
        assert found.metrics[f"experts.entropy.{name}"].item() == pytest.approx(local[name])
        assert found.metrics[f"experts.used.{name}"].item() == pytest.approx(math.exp(used[name]))
    assert len(found.metrics) <= 12


def test_a_modality_without_tokens_has_no_loss_and_a_finite_gradient():
    params = settings()
    sums = {name: torch.rand(2, 11, requires_grad=True) for name in SHARED[0]}
    weights = {"video": 1.0, "audio": 1.0, "text": 0.0}
    found = routing_losses(
        {name: sums[name] * weight for name, weight in weights.items()}, SHARED, params
    )
    found.total.backward()
    assert found.metrics["experts.entropy.text"].item() == 0
    assert all(torch.isfinite(one.grad).all() for one in sums.values())


def test_specialisation_is_0_for_equal_shares_and_1_for_separate_experts():
    equal = [torch.tensor([[0.7, 0.2, 0.1, 0.0]])] * 3
    separate = [torch.eye(4)[n : n + 1] for n in range(3)]
    assert float(specialisation(equal)) == pytest.approx(0, abs=1e-6)
    assert float(specialisation(separate)) == pytest.approx(1)
    half = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])]
    information = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - math.log(2) / 2
    assert float(specialisation(half)) == pytest.approx(information / math.log(2))


@pytest.mark.parametrize(
    "experts",
    [
        {"number": 4},
        {"number": 4, "top_k": 2, "every": 1},
        {"number": 4, "capacity": 0.5},
    ],
)
def test_the_true_count_is_what_torch_counts(experts):
    deep = SIZE | {"depth": 4}
    video, audio, text = (small_params().model_dump()[name] for name in SHARED[0])
    towers = {"video": video | {"size": deep}, "audio": audio | {"size": deep}}
    params = small_params(**towers, text=text | {"size": deep}, experts=experts)
    with without_memory():
        model = build(params).eval()
    video, audio, text = (one.to("meta") for one in small_inputs(1))
    for encoder in (part for part in model.modules() if isinstance(part, Encoder)):
        encoder.register_forward_pre_hook(
            lambda _, given, more: (given, more | {"wanted": None}), with_kwargs=True
        )

    def rows_of(rows, weight, bias, ends, **_):
        return 2 * rows[0] * weight[1] * weight[2]

    operator = torch.ops.vatt_model_experts.grouped_linear
    with FlopCounterMode(display=False, custom_mapping={operator: rows_of}) as counter:
        model(video, audio, text[:, :1])
    counted = counter.get_total_flops()
    if experts.get("capacity"):  # rows of dropped choices are in the table, but not computed
        assert multimodal_flops(params, convention="true") < counted
    else:
        assert multimodal_flops(params, convention="true") == counted


def test_the_most_choices_are_those_that_have_room():
    assert most_choices(10, settings(top_k=2)) == 20
    assert most_choices(10, settings(top_k=2, capacity=1.0)) == 20
    assert most_choices(10, settings(capacity=0.5)) == 4 * 2


def test_more_experts_are_more_weights_at_the_same_operations():
    few, many = (small_params(experts={"number": number}) for number in (4, 8))
    router = 2 * 12 * 4 * (1 + 8 + 1 + 4 + 1 + 6)  # 4 more scores for each token
    assert multimodal_flops(many, convention="true") == router + multimodal_flops(
        few, convention="true"
    )
    sizes = [sum(w.numel() for w in build(params).parameters()) for params in (few, many)]
    assert sizes[1] - sizes[0] == 3 * 4 * (2 * 12 * 24 + 24 + 12 + 12)


@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
def test_weights_of_experts_are_those_of_the_built_model(backbone):
    params = small_params(backbone=backbone, experts={"number": 4, "top_k": 2})
    layers = [part for part in build(params).modules() if isinstance(part, ExpertLinear)]
    built = sum(weight.numel() for layer in layers for weight in layer.parameters())
    assert expert_weights(params) == (built, built // 2)
    assert expert_weights(small_params()) == (0, 0)


def test_a_model_with_experts_comes_back_from_its_folder(tmp_path):
    params = small_params(backbone="agnostic", experts={"number": 4, "capacity": 1.0})
    model = build(params).eval()
    save(model, params, tmp_path)
    loaded = load(tmp_path)
    assert loaded.params == params
    weights, read = model.state_dict(), loaded.state_dict()
    assert weights.keys() == read.keys()
    assert all(torch.equal(weights[name], read[name]) for name in weights)
    # Not to the bit: where the numbers lie in memory decides the order of a product's sums.
    torch.testing.assert_close(model(*small_inputs()).text_vt, loaded(*small_inputs()).text_vt)


def test_a_classifier_has_the_experts_of_its_tower():
    params = small_params(backbone="agnostic", experts={"number": 4})
    classifier = build_classifier(params, modality="audio", num_classes=3, head_dropout=0.0)
    classifier(small_inputs()[1]).sum().backward()
    experts = next(part for part in classifier.modules() if isinstance(part, Experts))
    assert all(weight.grad is not None for weight in experts.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": {"number": 1, "top_k": 2}}, "cannot be larger"),
        ({"experts": {"number": 4, "least_experts": 5}}, "cannot be larger"),
        ({"experts": {"number": 4}, "recipe": "release"}, "needs model.recipe: paper"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        small_params(**changes)


def test_experts_need_a_second_block():
    plain = small_params().model_dump()
    for name in SHARED[0]:
        plain[name]["size"]["depth"] = 1
    with pytest.raises(ValidationError, match="encoders of 2 blocks"):
        ModelParams.model_validate(plain | {"experts": {"number": 4}})


def test_without_experts_the_settings_do_not_name_them():
    assert "experts" not in small_params().model_dump()
    assert small_params(experts={"number": 4}).model_dump()["experts"]["top_k"] == 1
