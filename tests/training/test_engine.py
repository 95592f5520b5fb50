"""The engines beyond what test_many_processes.py compares: settings, saving, offloading."""

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.training import tiny
from tests.training.tiny import needs_compiler
from vatt.errors import MachineError, SettingsError
from vatt.losses import anchors_loss, mil_nce
from vatt.model.operators import FusedFunction
from vatt.model.patches import choose_kept, draw_kept
from vatt.training.engine import DeepSpeedEngine, LocalEngine, apply_options, compiles
from vatt.training.pretrain import Pretraining, Visible, pretraining_inputs

OPTIMIZER = tiny.pretrain_params().optimizer


class Regression(torch.nn.Module):
    """A layer whose loss needs nothing but numbers."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, inputs):
        return {"loss": self.layer(inputs).square().mean()}


def engine(**changes):
    torch.manual_seed(0)
    optimizer = OPTIMIZER.model_copy(update=changes)
    return LocalEngine(Regression(), optimizer, "fp32")


def step(one, number=0):
    torch.manual_seed(number)
    loss = one(torch.randn(4, 3))["loss"]
    return loss.item(), float(one.update(loss, learning_rate=0.1))


def test_the_norm_is_the_one_before_clipping():
    _, free = step(engine(clip_norm=None))
    _, clipped = step(engine(clip_norm=1e-3))
    assert free == pytest.approx(clipped) and free > 1e-3


def test_clipping_scales_the_gradient_to_the_given_norm():
    one, other = engine(clip_norm=1e-3, name="sgd"), engine(clip_norm=None, name="sgd")
    before = other.weights()["layer.weight"].clone()
    _, norm = step(one)
    step(other)
    moves = [e.weights()["layer.weight"] - before for e in (one, other)]
    torch.testing.assert_close(moves[0], moves[1] * 1e-3 / norm, rtol=1e-2, atol=1e-8)


def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path):
    calm, saved = engine(), engine()
    for number in range(3):
        step(calm, number), step(saved, number)
    saved.save(tmp_path)
    resumed = engine()
    resumed.load(tmp_path)
    assert [step(calm, n) for n in range(3, 6)] == [step(resumed, n) for n in range(3, 6)]


@pytest.mark.parametrize(("offload", "zero"), [("optimizer", 0), ("all", 2)])
def test_offloading_without_its_zero_stage_is_refused(offload, zero):
    machine = tiny.machine_params(offload=offload, zero_stage=zero)
    with pytest.raises(SettingsError, match=r"machine\.offload"):
        DeepSpeedEngine(Regression(), OPTIMIZER, "fp32", machine)


def test_compiling_says_what_it_needs(monkeypatch):
    with pytest.raises(SettingsError, match="zero_stage 3"):
        apply_options(Regression(), tiny.machine_params(compile=True, zero_stage=3))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match=r"no-such-compiler\n.*machine\.compile=false"):
        apply_options(Regression(), tiny.machine_params(compile=True))


COLOUR = torch.tensor([0.1, 1.2, 0.8, 0.1])


@needs_compiler  # which is looked for, though "eager" does not use it
def test_one_compilation_serves_micro_batches_of_every_size():
    counters = torch._dynamo.utils.counters

    def step(module, clips):
        batch = tiny.make_batch(0, size=clips)
        batch.changes["video"] = COLOUR.repeat(clips, 1)
        module(*pretraining_inputs(module.model, batch, 0, drop_rate=0.5, seed=0))

    def graphs(clips, micro):
        torch._dynamo.reset()
        counters.clear()
        model = tiny.make_model(tiny.model_params())
        module = Pretraining(model, tiny.pretrain_params(), micro_batch_size=micro)
        machine = tiny.machine_params(compile=True, micro_batch_size=micro)
        apply_options(module, machine, backend="eager")
        for number in clips:
            step(module, number)
        return counters["stats"]["unique_graphs"]

    alone = graphs([8], None)
    # Parts of 2 3 3, of 2 2 3, of 2 3 and of 2 2 clips; kept ones are graphs of their own.
    assert graphs([8, 7, 5, 4], 3) == graphs([8], 3) <= 2 * alone


@needs_compiler
def test_every_form_of_a_block_is_compiled_or_training_stops(monkeypatch):
    """Torch's limit is 8 forms; over it, blocks would silently run as they are."""

    def step():
        torch._dynamo.reset()
        params = tiny.model_params()
        deep = params.video.size.model_copy(update={"depth": 3})
        changes = {"video": {"size": deep}, "text": {"size": deep.model_copy(update={"dim": 24})}}
        params = params.model_copy(
            update={
                name: getattr(params, name).model_copy(update=change)
                for name, change in changes.items()
            }
        )
        model = tiny.make_model(params)
        module = Pretraining(model, tiny.pretrain_params(), micro_batch_size=3)
        apply_options(
            module, tiny.machine_params(compile=True, micro_batch_size=3), backend=counted
        )
        batch = tiny.make_batch(0, size=8)
        batch.changes["video"] = COLOUR.repeat(8, 1)
        losses = module(*pretraining_inputs(model, batch, 0, drop_rate=0.5, seed=0))
        losses["loss"].backward()

    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # The patch also gives back the values that compiling sets.
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        step()
        assert sum("mlp" in graph.code for graph in graphs) > 8
        monkeypatch.setattr("vatt.training.engine.MAX_FORMS", 8)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            step()


class Called(TorchDispatchMode):
    """Notes torch's operators, but not what compiled code does without them."""

    def __init__(self):
        super().__init__()
        self.names = []

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [] if func.is_view else [str(func)]
        return func(*args, **(kwargs or {}))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_compiled_colours_are_those_of_the_plain_form_in_one_pass(kind):
    model = tiny.make_model(tiny.model_params())
    visible = Visible(model.video.embed)
    batch = tiny.make_batch(0)
    colour = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) * 0.4 + COLOUR / 2
    kept = draw_kept(model.token_counts["video"], 0.5, seed=0, step=0, samples=range(8))
    with Called() as one_by_one:
        plain = visible(batch.video, colour, kept, kind)
    torch._dynamo.reset()
    apply_options(visible, tiny.machine_params(compile=True))
    visible(batch.video, colour, kept, kind)
    with Called() as fused:
        found = visible(batch.video, colour, kept, kind)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5 if kind == torch.float32 else 1e-2)
    assert len(one_by_one.names) > 40 and not fused.names


@needs_compiler
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_draw_is_the_plain_one_index_for_index_in_every_step(backend):
    def drawn(**more):
        return [
            draw_kept(tokens, 0.5, seed=1, step=step, samples=samples, stream="video", **more)
            for step in (0, 1, 499_999)
            for tokens in (1568, 98)
        ]

    samples, choose = torch.tensor([0, 1, 2047, 10**6]), FusedFunction(choose_kept)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    apply_options(choose, tiny.machine_params(compile=True), backend=backend)
    for found, plain in zip(drawn(choose=choose), drawn(), strict=True):
        assert torch.equal(found, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for each length


@needs_compiler
@pytest.mark.slow
def test_the_compiled_loss_has_the_plain_one_s_value_and_gradients():
    torch.manual_seed(0)
    vectors = [F.normalize(torch.randn(*shape, 24), dim=-1) for shape in ((12,), (12, 3))]
    valid = torch.rand(12, 3) > 0.3
    torch._dynamo.reset()
    compiled = FusedFunction(anchors_loss)
    apply_options(compiled, tiny.machine_params(compile=True))

    def loss_and_gradients(max_scores, **more):
        given = [part.clone().requires_grad_() for part in vectors]
        loss = mil_nce(*given, 0.07, valid=valid, max_scores=max_scores, **more)
        return loss, *torch.autograd.grad(loss, given)

    plain = loss_and_gradients(2**20)
    for max_scores in (2**20, 5 * 36):  # at once, and in blocks of 5, 5 and 2 clips
        found = loss_and_gradients(max_scores, compiled=compiled)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


@needs_compiler
def test_draw_positions_of_words_unit_vectors_and_losses_run_compiled():
    def hidden(graph, inputs):
        def run(*values):
            with _disable_current_modes():
                return graph(*values)

        return run

    def step():
        with Called() as called:
            module(*pretraining_inputs(module.model, tiny.make_batch(0), 0, drop_rate=0.5, seed=0))
        return {name.split(".")[1] for name in called.names}

    torch._dynamo.reset()
    module = Pretraining(tiny.make_model(tiny.model_params()), tiny.pretrain_params())
    telling = {"bitwise_xor", "log", "linalg_vector_norm", "logsumexp"}
    assert telling <= step()
    apply_options(module, tiny.machine_params(compile=True), backend=hidden)
    module(*pretraining_inputs(module.model, tiny.make_batch(0), 0, drop_rate=0.5, seed=0))
    assert not telling & step()


def test_compile_auto_is_on_for_gpus_with_a_compiler_below_zero_stage_3(monkeypatch):
    def auto(*, gpu=True, compiler="sh", zero_stage=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setenv("CC", compiler)
        return compiles(tiny.machine_params(compile="auto", zero_stage=zero_stage))

    assert auto() and not auto(gpu=False)
    assert not auto(compiler="no-such-compiler")
    assert not auto(zero_stage=3)
