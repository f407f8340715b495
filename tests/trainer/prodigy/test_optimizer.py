"""Prodigy against prodigyopt: the same numbers and the same state dict, without waiting for the device."""

import contextlib
import copy
import io
import itertools
import shutil

import prodigyopt
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.prodigy import Prodigy, c_kernels, kernels

SETTINGS = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "coupled decay": {"weight_decay": 0.01, "decouple": False},
    "bias correction": {"use_bias_correction": True, "weight_decay": 0.1},
    "safeguard": {"safeguard_warmup": True, "use_bias_correction": True},
    "growth rate": {"growth_rate": 1.02, "d_coef": 2.0, "beta3": 0.99},
    "large eps": {"eps": 0.01},
    "no momentum": {"betas": (0.0, 0.99), "weight_decay": 0.01, "decouple": False},
}
SLICES = pytest.mark.parametrize("slice_p", [1, 11])


class Operations(Prodigy):
    """The path without a compiler."""

    use_kernels = False


class TinyGPT(nn.Module):
    """A causal block on tied embeddings; some parameters begin as zeros, some as ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 16)
        self.place = nn.Parameter(torch.zeros(12, 16))
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.bias = nn.Parameter(torch.zeros(37))
        nn.init.normal_(self.embed.weight, std=0.1)

    def loss(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens[:, :-1]) + self.place
        query, key, value = self.qkv(self.norm(hidden)).unsqueeze(1).chunk(3, dim=-1)
        hidden = hidden + nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0]
        hidden = hidden + self.down(self.up(hidden).relu())
        logits = hidden @ self.embed.weight.T + self.bias
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def tiny_gpt() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT()


def batch(step: int) -> Tensor:
    """Every token follows from the one before, but for some noise."""
    draw = torch.Generator().manual_seed(step)
    start, noise = torch.randint(37, (4, 1), generator=draw), torch.randint(2, (4, 13), generator=draw)
    return (start + 5 * torch.arange(13) + noise) % 37


def theirs(params, **settings) -> prodigyopt.Prodigy:
    with contextlib.redirect_stdout(io.StringIO()):
        return prodigyopt.Prodigy(params, **settings)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is too small for two, and where other jobs run they would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recorded() -> list[list[Tensor]]:
    """1,000 steps of gradients of a model in training."""
    model = tiny_gpt()
    optimizer, gradients = theirs(model.parameters()), []
    for step in range(1000):
        optimizer.zero_grad()
        model.loss(batch(step)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return gradients


def two_groups(params: list[nn.Parameter], lr: float) -> list[dict]:
    return [{"params": params[::2]}, {"params": params[1::2], "lr": lr, "weight_decay": 0.02, "eps": 1e-6}]


def feed(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = None if gradient is None else gradient.clone()
    optimizer.step()


def d_of(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.state_dict()["param_groups"][0]["d"]


def norm_of(params: list[nn.Parameter]) -> float:
    return torch.nn.utils.get_total_norm([p.detach().double() for p in params]).item()


def assert_close(ours, our_params, other, other_params, rel: float = 1e-5) -> None:
    assert d_of(ours) == pytest.approx(d_of(other), rel=rel)
    assert norm_of(our_params) == pytest.approx(norm_of(other_params), rel=rel)
    mine, yours = ours.state_dict(), other.state_dict()
    assert mine["state"].keys() == yours["state"].keys()
    for key, state in yours["state"].items():
        assert {k: getattr(v, "shape", v) for k, v in mine["state"][key].items()} == {
            k: getattr(v, "shape", v) for k, v in state.items()
        }
        assert mine["state"][key]["s"].norm().item() == pytest.approx(state["s"].norm().item(), rel=10 * rel)
    for a, b in zip(mine["param_groups"], yours["param_groups"], strict=True):
        assert {k: type(v) for k, v in a.items()}.items() >= {k: type(v) for k, v in b.items()}.items()
        assert a["k"] == b["k"]


def replay(gradients, build, other=theirs, make=list, **settings) -> None:
    """Feed both optimizers the gradients and compare where it ends."""
    ours, yours = (list(tiny_gpt().parameters()) for _ in range(2))
    one, two = build(make(ours), **settings), other(make(yours), **settings)
    for step in gradients:
        feed(one, ours, step)
        feed(two, yours, step)
    assert_close(one, ours, two, yours)


@pytest.mark.parametrize(
    ("name", "slice_p"),
    [*((name, 1) for name in SETTINGS), *((name, 11) for name in ("default", "coupled decay", "bias correction"))],
)
def test_thousand_recorded_gradients_give_prodigyopts_numbers(recorded, name, slice_p) -> None:
    enough = 200 if name in ("large eps", "no momentum") else 1000
    replay(recorded[:enough], Prodigy, slice_p=slice_p, **SETTINGS[name])


@pytest.mark.parametrize(("lr", "slice_p"), [(1.0, 1), (0.0, 11)])
def test_thousand_recorded_gradients_in_two_groups(recorded, slice_p, lr) -> None:
    """With slice_p 11 d is the sum of few elements, and rounding is amplified while d is near a d0 of 1e-6: on a CPU
    without AVX-512 both optimizers are then 1.4e-4 from float64, and 1e-5 apart."""
    settings = {"slice_p": slice_p, "weight_decay": 0.1, "d0": 1e-6 if slice_p == 1 else 1e-4}
    replay(recorded, Prodigy, make=lambda params: two_groups(params, lr), **settings)


FACTORS = (1.0, 0.1, 3.0)


def with_factors(params: list[nn.Parameter]) -> list[dict]:
    return [{"params": params[i::3], "lr_factor": factor} for i, factor in enumerate(FACTORS)]


def scaled(params: list[nn.Parameter]) -> list[dict]:
    """The groups that prodigyopt trains for parameters w / factor."""
    weight_decay, eps = 0.05, 1e-8
    return [
        {"params": params[i::3], "weight_decay": weight_decay * factor, "eps": eps * factor}
        for i, factor in enumerate(FACTORS)
    ]


@pytest.mark.parametrize("build", [Prodigy, Operations])
def test_factor_on_the_rate_is_prodigyopt_on_parameters_divided_by_it(recorded, build) -> None:
    ours, yours = (list(tiny_gpt().parameters()) for _ in range(2))
    factor_of = {i: FACTORS[i % 3] for i in range(len(ours))}
    with torch.no_grad():
        for i, p in enumerate(yours):
            p.div_(factor_of[i])
    settings = {"weight_decay": 0.05, "d0": 1e-5}
    one, two = build(with_factors(ours), **settings), theirs(scaled(yours), **settings)
    for step in recorded[:100]:
        feed(one, ours, step)
        feed(two, yours, [gradient * factor_of[i] for i, gradient in enumerate(step)])
    assert d_of(one) == pytest.approx(d_of(two), rel=1e-4)
    for i, (mine, other) in enumerate(zip(ours, yours, strict=True)):
        torch.testing.assert_close(mine, other * factor_of[i], rtol=1e-3, atol=1e-5)


@SLICES
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_without_a_compiler_the_numbers_are_the_same(recorded, settings, slice_p) -> None:
    replay(recorded[:25], Operations, slice_p=slice_p, **settings)
    replay(recorded[:25], Operations, other=Prodigy, slice_p=slice_p, **settings)


@SLICES
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_training_for_twenty_steps_gives_prodigyopts_numbers(settings, slice_p) -> None:
    """With a d0 of 1e-6 the first updates are as small as a rounding error of the parameters, and the order of
    summation would be amplified to 3e-5 of d within 20 steps."""
    settings = {**settings, "d0": 1e-5}
    ours, other = tiny_gpt(), tiny_gpt()
    pair = [(ours, Prodigy(ours.parameters(), slice_p=slice_p, **settings))]
    pair.append((other, theirs(other.parameters(), slice_p=slice_p, **settings)))
    for step, (model, optimizer) in itertools.product(range(20), pair):
        optimizer.zero_grad()
        model.loss(batch(step)).backward()
        optimizer.step()
    assert_close(pair[0][1], list(ours.parameters()), pair[1][1], list(other.parameters()))


@SLICES
@pytest.mark.parametrize("build", [Prodigy, Operations])
def test_parameters_without_gradients_stay_unchanged(recorded, build, slice_p) -> None:
    """One never has a gradient, one gets its first late, one only now and then."""
    gradients = [list(step) for step in recorded[:60]]
    for number, step in enumerate(gradients):
        step[2] = None
        step[3] = step[3] if number >= 30 else None
        step[4] = step[4] if number % 3 else None
    replay(gradients, build, slice_p=slice_p, weight_decay=0.1)

    params = list(tiny_gpt().parameters())
    before, optimizer = params[2].clone(), build(params, weight_decay=0.1)
    feed(optimizer, params, gradients[0])
    assert torch.equal(params[2], before) and params[2] not in optimizer.state


@SLICES
@pytest.mark.parametrize("build", [Prodigy, Operations])
def test_denominator_of_zero_changes_no_parameter(recorded, build, slice_p) -> None:
    """With slice_p 11 the gradients that count may all be zero while others are not; and later some learn again."""
    quiet = [torch.zeros_like(gradient) for gradient in recorded[0]]
    for gradient in quiet:
        gradient.view(-1)[1:2] = 0.0 if slice_p == 1 else 1e-3
    params = list(tiny_gpt().parameters())
    before, optimizer = copy.deepcopy(params), build(params, slice_p=slice_p, weight_decay=1e4)
    for _ in range(3):
        feed(optimizer, params, quiet)
    assert all(map(torch.equal, params, before))
    assert optimizer.state_dict()["param_groups"][0]["k"] == 0
    replay([quiet] * 3 + recorded[:20], build, slice_p=slice_p, weight_decay=0.1)

    # Nothing learns but one parameter that never counts: d_denom is zero again.
    only = [gradient if number == 5 else None for number, gradient in enumerate(quiet)]
    without = [None if number == 5 else gradient for number, gradient in enumerate(recorded[0])]
    params = list(tiny_gpt().parameters())
    optimizer = build(params, slice_p=slice_p, weight_decay=0.1)
    for step in (without, without, only, without, only):
        before = copy.deepcopy(params)
        feed(optimizer, params, step)
        assert all(map(torch.equal, params, before)) == (step is only)
        for group in optimizer.param_groups:  # so far up that d rests
            group["d"] = group["d_max"] = 0.5


@pytest.mark.parametrize("build", [Prodigy, Operations])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_found_inf_skips_the_update_wholly_and_d_moves_on(recorded, build, settings) -> None:
    params = list(tiny_gpt().parameters())
    optimizer = build(params, slice_p=2, **settings)
    for step in recorded[:5]:
        feed(optimizer, params, step)
    before = copy.deepcopy((params, optimizer.state_dict()))
    optimizer.found_inf = torch.ones(())
    for poison in (float("nan"), float("inf"), 1.0):
        feed(optimizer, params, [gradient * poison for gradient in recorded[5]])
    assert all(map(torch.equal, params, before[0]))
    assert_equal(optimizer.state_dict(), before[1])

    optimizer.found_inf = torch.zeros(())
    for step in recorded[5:20]:
        feed(optimizer, params, step)
    assert d_of(optimizer) > before[1]["param_groups"][0]["d"] or "safeguard_warmup" in settings
    twin = list(tiny_gpt().parameters())
    unharmed = build(twin, slice_p=2, **settings)
    for step in recorded[:20]:
        feed(unharmed, twin, step)
    assert all(map(torch.equal, params, twin))


def assert_equal(one, two) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    elif isinstance(one, Tensor):
        assert one.shape == two.shape and torch.equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize("build", [Prodigy, Operations])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_gradients_are_divided_by_grad_scale(recorded, build, settings) -> None:
    plain, scaled = (list(tiny_gpt().parameters()) for _ in range(2))
    one, two = build(plain, **settings), build(scaled, **settings)
    for number, step in enumerate(recorded[:20]):
        scale = 2.0**number
        two.grad_scale = torch.tensor(scale)
        feed(one, plain, step)
        feed(two, scaled, [gradient * scale for gradient in step])
    assert all(map(torch.equal, plain, scaled))


def test_grad_scaler_drives_it() -> None:
    model = tiny_gpt()
    optimizer, scaler = Prodigy(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model.loss(batch(step))).backward()
        if step == 2:
            model.bias.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state_dict()["param_groups"][0]["k"] == 3
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("build", [Prodigy, Operations])
def test_grad_norm_is_the_norm_of_all_gradients(recorded, build) -> None:
    params = list(tiny_gpt().parameters())
    optimizer = build(two_groups(params, 1.0))
    assert optimizer.grad_norm().item() == 0.0
    feed(optimizer, params, recorded[0])
    params[0].grad = None
    expected = torch.cat([gradient.flatten() for gradient in recorded[0][1:]]).double().norm()
    assert optimizer.grad_norm().dtype == torch.float32
    assert optimizer.grad_norm().item() == pytest.approx(expected.item(), rel=1e-6)
    params[1].grad.view(-1)[0] = float("nan")
    assert optimizer.grad_norm().isnan()


@SLICES
@pytest.mark.parametrize("settings", [SETTINGS["bias correction"], SETTINGS["no momentum"]])
def test_checkpoint_of_either_optimizer_resumes_with_the_other(recorded, settings, slice_p) -> None:
    def run(first, second) -> tuple:
        params = list(tiny_gpt().parameters())
        optimizer = first(two_groups(params, 1.0), slice_p=slice_p, **settings)
        for step in recorded[:10]:
            feed(optimizer, params, step)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes[first] = file.tell()
        file.seek(0)
        optimizer = second(two_groups(params, 1.0), slice_p=slice_p, **settings)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        for step in recorded[10:40]:
            feed(optimizer, params, step)
        return optimizer, params

    sizes = {}
    settings = {**settings, "d0": 1e-5}
    reference = run(theirs, theirs)
    for first, second in ((Prodigy, theirs), (theirs, Prodigy), (Prodigy, Prodigy), (Prodigy, Operations)):
        assert_close(*run(first, second), *reference)
    assert sizes[Prodigy] <= sizes[theirs]


@pytest.mark.parametrize("build", [Prodigy, Operations])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_resuming_from_its_own_checkpoint_is_bit_equal(recorded, build, settings) -> None:
    one, two = (list(tiny_gpt().parameters()) for _ in range(2))
    whole, first = build(one, slice_p=2, **settings), build(two, slice_p=2, **settings)
    for step in recorded[:10]:
        feed(whole, one, step)
        feed(first, two, step)
    second = build(two, slice_p=2, **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in recorded[10:40]:
        feed(whole, one, step)
        feed(second, two, step)
    assert all(map(torch.equal, one, two))
    assert_equal(whole.state_dict(), second.state_dict())


def test_reading_the_state_changes_nothing(recorded) -> None:
    one, two = (list(tiny_gpt().parameters()) for _ in range(2))
    read, unread = Prodigy(one), Prodigy(two)
    assert_equal(read.state_dict(), theirs(two).state_dict())
    for step in recorded[:20]:
        feed(read, one, step)
        read.state_dict()
        feed(unread, two, step)
    assert all(map(torch.equal, one, two))


class _HostReads(TorchDispatchMode):
    """Collects the operations by which a number gets to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.reads.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", [Prodigy, Operations])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_step_reads_nothing_on_the_host(build, settings) -> None:
    def steps(optimizer, params) -> Tensor:
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            norm = optimizer.grad_norm()
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.grad_scale = norm.clamp(min=1.0)
            optimizer.step()
        return optimizer.d_on_device()

    with _HostReads() as counted:
        params = list(tiny_gpt().parameters())
        counted.reads.clear()
        steps(build(params, slice_p=2, **settings), params)
    assert counted.reads == []

    # Here every read of a value raises.
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.zeros(7))]
        assert isinstance(steps(build(params, slice_p=2, **settings), params), FakeTensor)


def test_d_is_a_tensor_on_the_device_and_may_be_set(recorded) -> None:
    params = list(tiny_gpt().parameters())
    optimizer = Prodigy(params)
    assert optimizer.d_on_device().item() == 1e-6
    for step in recorded[:20]:
        feed(optimizer, params, step)
    kept = optimizer.param_groups[0]["d"]
    value = kept.item()
    assert optimizer.d_on_device() is kept and value > 1e-6
    for step in recorded[20:60]:
        feed(optimizer, params, step)
    assert kept.item() == value < d_of(optimizer)
    for group in optimizer.param_groups:
        group["d"] = group["d_max"] = 0.5
    feed(optimizer, params, recorded[20])
    assert d_of(optimizer) >= 0.5


def test_other_layouts_and_types_use_pytorch_operations() -> None:
    def build() -> list[nn.Parameter]:
        torch.manual_seed(1)
        convolution = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
        return [nn.Parameter(t) for t in (convolution, torch.randn(6, 5).t(), torch.randn(3), torch.randn(()))]

    def run(make, dtype=torch.float32) -> tuple:
        params = [nn.Parameter(p.detach().to(dtype)) for p in build()]
        optimizer, draw = make(params, weight_decay=0.1), torch.Generator().manual_seed(2)
        for _ in range(20):
            for p in params:
                p.grad = (torch.randn(p.shape, generator=draw) + p.detach().sign().float()).to(dtype)
            optimizer.step()
        return optimizer, params

    for dtype in (torch.float32, torch.float64):
        assert_close(*run(Prodigy, dtype), *run(theirs, dtype))


def test_parameters_may_be_loaded_and_replaced(recorded) -> None:
    model, other = tiny_gpt(), tiny_gpt()
    ours, yours = list(model.parameters()), list(other.parameters())
    one, two = Prodigy(ours), theirs(yours)
    for step in recorded[:10]:
        feed(one, ours, step)
        feed(two, yours, step)
    model.load_state_dict(other.state_dict())
    ours[1].data = ours[1].data.clone()
    state = copy.deepcopy(one.state_dict())
    for saved in state["state"].values():  # as another parameter's layout would have left it
        saved["exp_avg"] = saved["exp_avg"].t().contiguous().t() if saved["exp_avg"].dim() == 2 else saved["exp_avg"]
    one.load_state_dict(state)
    for step in recorded[10:20]:
        feed(one, ours, step)
        feed(two, yours, step)
    assert_close(one, ours, two, yours)


def test_kernel_is_used_and_big_tensors_span_chunks() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    torch.manual_seed(3)
    size = c_kernels.CHUNK_SIZE
    start, results = [torch.randn(3, size + 5), torch.randn(2 * size), torch.randn(1)], []
    for build in (Prodigy, Operations):
        params, draw = [nn.Parameter(t.clone()) for t in start], torch.Generator().manual_seed(4)
        optimizer = build(params, slice_p=11, weight_decay=0.1)
        for _ in range(30):
            feed(optimizer, params, [torch.randn(p.shape, generator=draw) + p.detach() for p in params])
        part = optimizer._part(optimizer.param_groups[0])
        assert (part.kernel is not None) == (build is Prodigy) and len(part.operations) == 3 * (build is Operations)
        results.append((optimizer, params))
    assert_close(*results[0], *results[1])
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_missing_compiler_is_logged_once_and_training_continues(monkeypatch, caplog) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert c_kernels.load_c_kernels.__wrapped__() is None
    monkeypatch.setenv("CC", "false")
    assert c_kernels.load_c_kernels.__wrapped__() is None
    assert [record.message.split(":")[0] for record in caplog.records] == ["prodigy", "prodigy"]
    monkeypatch.setattr(kernels, "load_c_kernels", lambda: None)
    params = list(tiny_gpt().parameters())
    feed(Prodigy(params), params, [torch.ones_like(p) for p in params])


def test_optimizer_prints_nothing(capsys) -> None:
    Prodigy(tiny_gpt().parameters(), weight_decay=0.1)
    assert capsys.readouterr().out == ""


def test_unsupported_uses_are_refused() -> None:
    params = list(tiny_gpt().parameters())
    with pytest.raises(ValueError, match=r"use prodigyopt\.Prodigy"):
        Prodigy(params, fsdp_in_use=True)
    optimizer = Prodigy(two_groups(params, 0.5))
    with pytest.raises(RuntimeError, match=r"lr \[1.0, 0.5\]"):
        optimizer.step()
    feed(optimizer := Prodigy(params), params, [torch.ones_like(p) for p in params])
    optimizer.param_groups[0]["slice_p"] = 11
    with pytest.raises(ValueError, match=r"shape \(12, 16\) on cpu with slice_p 11; load a checkpoint"):
        optimizer.step()
    mixed = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    with pytest.raises(ValueError, match="parameters on cpu and meta"):
        feed(Prodigy(mixed), mixed, [torch.ones_like(p) for p in mixed])


@pytest.mark.gpu
@SLICES
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_on_cuda_the_numbers_are_the_same_and_nothing_waits(recorded, settings, slice_p) -> None:
    results = []
    for build in (Prodigy, Operations, theirs):
        params = [nn.Parameter(p.detach().cuda()) for p in tiny_gpt().parameters()]
        optimizer = build(params, slice_p=slice_p, **settings)
        for number, step in enumerate(recorded[:200]):
            on_device = [gradient.cuda() for gradient in step]
            torch.cuda.set_sync_debug_mode("error" if build is not theirs and number > 1 else "default")
            feed(optimizer, params, on_device)
            torch.cuda.set_sync_debug_mode("default")
        results.append((optimizer, params))
    assert_close(*results[0], *results[2])
    assert_close(*results[1], *results[2])
