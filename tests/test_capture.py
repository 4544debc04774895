import functools
import threading

import pytest
import torch
from torch import nn

from repkit.capture import Point, capture
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.unet_model()


def example(rows=2, seed=0):
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def run(x_t, t=100):
    return lambda model: model(x_t, t, return_dict=False)[0]


def by_hook(model, path, x_t):
    """An ordinary hook in an ordinary forward, on the model itself."""
    taken = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: taken.append(output))
    run(x_t)(model)
    handle.remove()
    return taken[0]


def first(value):
    return value[0] if isinstance(value, tuple) else value


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def state_of(model):
    return {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_untouched(model, state, modules):
    assert hooks_of(model) == 0
    assert dict(model.named_modules()) == modules
    assert all(module.__class__.__call__ is nn.Module.__call__ for module in model.modules())
    now = state_of(model)
    assert now.keys() == state.keys()
    assert all(now[name][0] == state[name][0] and torch.equal(now[name][1], state[name][1]) for name in state)


def through_original(model, how):
    """Give `model` a forward of its own that is bound to it, as offloading wrappers do."""
    bound = model.forward
    model.forward = functools.partial(bound) if how == "partial" else lambda *args, **kwargs: bound(*args, **kwargs)
    return model


PATHS = ["conv_in", "down_blocks.0", "down_blocks.1.resnets.0.conv2", "mid_block", "mid_block.attentions.0.to_k"]
PATHS += ["up_blocks.0.attentions.1", "up_blocks.1", "conv_norm_out", "conv_out"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_stopped_equals_an_ordinary_hook_bit_for_bit(path, wrapped):
    model, x_t = tiny.unet_model(), example()
    expected = by_hook(model, path, x_t)
    if wrapped:
        through_original(model, "partial")
    found = capture(model, [Point(path)], run(x_t))[Point(path)]
    assert torch.equal(first(found), first(expected))


def test_many_points_in_one_forward(model):
    x_t, points = example(), [Point(path) for path in PATHS]
    calls = []

    def counted(stand_in):
        calls.append(stand_in)
        return run(x_t)(stand_in)

    found = capture(model, points[::-1], counted)
    assert len(calls) == 1 and set(found) == set(points)
    assert all(torch.equal(first(found[point]), first(by_hook(model, point.path, x_t))) for point in points)


def test_nothing_after_the_last_point_runs():
    model, later = tiny.unet_model(), []
    for path in ("up_blocks.0.resnets.1", "up_blocks.1.resnets.0", "conv_norm_out", "conv_out"):
        model.get_submodule(path).register_forward_hook(lambda module, args, output, path=path: later.append(path))
    capture(model, [Point("down_blocks.0"), Point("up_blocks.0.resnets.0")], run(example()))
    assert later == []
    capture(model, [Point("mid_block")], run(example()), stop=False)
    assert later == ["up_blocks.0.resnets.1", "up_blocks.1.resnets.0", "conv_norm_out", "conv_out"]


def test_the_input_side(model):
    x_t = example()
    point = Point("mid_block.attentions.0.to_q", "input")
    seen = []
    handle = model.get_submodule(point.path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(x_t)(model)
    handle.remove()
    found = capture(model, [point, Point(point.path)], run(x_t))
    assert torch.equal(found[point], seen[0])
    assert torch.equal(found[Point(point.path)], model.get_submodule(point.path)(seen[0]))


def test_a_call_can_be_made_again():
    model, x_t = tiny.unet_model(), example()
    path = "mid_block.attentions.0"
    points = [
        Point(path, "call"),
        Point(path, "input"),
        Point(path),
        Point(f"{path}.to_q", "call"),
        Point(f"{path}.to_q"),
    ]
    found = capture(model, points, run(x_t))
    module, args, kwargs = found[points[0]]
    assert module is not model.get_submodule(path) and args[0] is found[points[1]]
    assert torch.equal(model.get_submodule(path)(*args, **kwargs), found[points[2]])
    module, args, kwargs = found[points[3]]
    assert torch.equal(module(*args, **kwargs), found[points[4]])


ATTENTION = Point("mid_block.attentions.0", "attention")


@pytest.mark.parametrize("how", [None, "partial", "closure"])
def test_attention_is_watched_in_any_kind_of_forward(how):
    plain, x_t = tiny.unet_model(), example()
    expected = capture(plain, [ATTENTION], run(x_t))[ATTENTION]
    model = plain if how is None else through_original(tiny.unet_model(), how)
    state, modules = state_of(model), dict(model.named_modules())
    attributes = dict(vars(model.get_submodule(ATTENTION.path)))
    points = [ATTENTION, Point(ATTENTION.path), Point("up_blocks.1")]
    found = capture(model, points, run(x_t))
    assert torch.equal(found[ATTENTION].q, expected.q) and torch.equal(found[ATTENTION].k, expected.k)
    assert all(torch.equal(first(found[point]), first(by_hook(plain, point.path, x_t))) for point in points[1:])
    assert_untouched(model, state, modules)
    assert dict(vars(model.get_submodule(ATTENTION.path))) == attributes


@pytest.mark.parametrize("how", [None, "closure"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_no_watch_is_left_by_an_error(how, error):
    model = tiny.unet_model() if how is None else through_original(tiny.unet_model(), how)

    def fail(module, args):
        raise error

    handle = model.get_submodule(f"{ATTENTION.path}.to_q").register_forward_pre_hook(fail)
    before = torch._C._len_torch_function_stack()
    with pytest.raises(error):
        capture(model, [ATTENTION, Point("up_blocks.0")], run(example()))
    handle.remove()
    assert torch._C._len_torch_function_stack() == before and hooks_of(model) == 0


@pytest.mark.parametrize("how", [None, "partial", "closure"])
def test_the_original_is_untouched(how):
    model = tiny.unet_model() if how is None else through_original(tiny.unet_model(), how)
    state, modules, attributes = state_of(model), dict(model.named_modules()), dict(vars(model))
    capture(model, [Point("mid_block"), Point("up_blocks.0.resnets.0.conv1", "input")], run(example()))
    assert_untouched(model, state, modules)
    with pytest.raises(RuntimeError):
        capture(model, [Point("up_blocks.0")], run(example()[:, :2]))
    with pytest.raises(ZeroDivisionError):
        capture(model, [Point("mid_block")], run(example()), taken_at=lambda point: 1 / 0)
    with pytest.raises(ValueError, match="no module"):
        capture(model, [Point("mid_block.resnets.0"), Point("mid_block.nothing")], run(example()))
    assert_untouched(model, state, modules)
    assert vars(model) == attributes


def test_hooks_of_the_caller_still_run_once():
    model, calls = tiny.unet_model(), []

    def double(module, args, output):
        calls.append(1)
        return 2 * output

    model.mid_block.register_forward_hook(double)
    found = capture(model, [Point("mid_block")], run(example()))[Point("mid_block")]
    assert calls == [1]
    assert torch.equal(found, 2 * by_hook(tiny.unet_model(), "mid_block", example()))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_normal_forward_in_another_thread_is_unaffected(wrapped):
    model, x_t = tiny.unet_model(), example()
    if wrapped:
        through_original(model, "closure")
    mid = Point("mid_block")
    expected, errors, done = run(x_t)(model), [], threading.Event()

    def forward_again_and_again():
        while not done.is_set():
            try:
                assert torch.equal(run(x_t)(model), expected)
            except BaseException as error:
                errors.append(error)
                return

    thread = threading.Thread(target=forward_again_and_again)
    thread.start()
    other = example(seed=1)
    truth = by_hook(tiny.unet_model(), "mid_block", other)
    for _ in range(40):
        assert torch.equal(capture(model, [ATTENTION, mid], run(other))[mid], truth)
    done.set()
    thread.join()
    assert errors == [] and hooks_of(model) == 0


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.spare, self.stages = nn.Linear(3, 3), nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x):
        return self.stages[0](self.layer(self.layer(x)))


def test_a_module_that_runs_twice_counts_with_its_first_call():
    model, x = Twice(), torch.ones(1, 3)
    for points in ([Point("layer")], [Point("layer"), Point("stages.0")]):
        assert torch.equal(capture(model, points, lambda stand_in: stand_in(x))[Point("layer")], model.layer(x))


@pytest.mark.parametrize("path", ["spare", "stages"])
def test_a_module_that_is_never_called_is_an_error(path):
    with pytest.raises(ValueError, match=f"{path} did not run in this forward"):
        capture(Twice(), [Point("layer"), Point(path)], lambda stand_in: stand_in(torch.ones(1, 3)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mid", "no module 'mid': UNet2DModel has conv_in, .*mid_block"),
        ("up_blocks.7.resnets.0", "no module 'up_blocks.7.resnets.0': up_blocks has 0, 1"),
        ("conv_in.weight", "no module 'conv_in.weight': conv_in has no modules"),
        ("mid_block.resnets.0.conv9", "mid_block.resnets.0 has norm1, conv1"),
    ],
)
def test_a_missing_path_says_where_it_ends(model, path, message):
    with pytest.raises(ValueError, match=message):
        capture(model, [Point(path)], run(example()))


def test_gradients_equal_plain_autograd(model):
    plain, stopped = example().requires_grad_(), example().requires_grad_()
    by_hook(model, "up_blocks.0", plain).square().sum().backward()
    capture(model, [Point("up_blocks.0")], run(stopped))[Point("up_blocks.0")].square().sum().backward()
    assert plain.grad.abs().max() > 0
    assert torch.equal(plain.grad, stopped.grad)


def test_gradients_reach_shared_parameters():
    model = tiny.unet_model().requires_grad_(True)
    capture(model, [Point("mid_block")], run(example()))[Point("mid_block")].sum().backward()
    assert model.conv_in.weight.grad.abs().max() > 0 and model.conv_out.weight.grad is None


def test_parts_compiled_in_place_are_passed_through():
    model, x_t = tiny.unet_model(), example()
    points = [Point("down_blocks.0"), Point("mid_block.resnets.0"), Point("up_blocks.0")]
    expected = capture(model, points, run(x_t))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model.mid_block.compile(backend=backend)  # its insides are tapped: runs uncompiled
    model.up_blocks[0].resnets[0].compile(backend=backend)  # runs compiled
    found = capture(model, points, run(x_t))
    assert compiled and hooks_of(model) == 0
    assert all(torch.allclose(first(found[point]), first(expected[point]), rtol=1e-5, atol=1e-5) for point in points)
