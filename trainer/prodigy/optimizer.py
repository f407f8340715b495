"""Prodigy at memory speed: prodigyopt's optimizer with the same numbers and the same state dict.

prodigyopt waits for two `.item()` per parameter, and reads its memory about twenty times. Here one kernel per
step reads and writes every number once, and every scalar (d, its numerator, the step counters) stays on the
device. The kernel is in C on CPU and in Triton on CUDA (`kernels.py`). Without a compiler, and for tensors that
are not contiguous float32, PyTorch's own operations compute the same numbers, as slowly as prodigyopt.

    optimizer = Prodigy(model.parameters(), weight_decay=0.01)
    norm = optimizer.grad_norm()                                # one pass, on the device
    optimizer.found_inf = (~norm.isfinite()).float()            # skip this update when 1
    optimizer.grad_scale = (norm / max_norm).clamp(min=1.0)     # clip without another pass
    optimizer.step()

Memory traffic: 36 bytes per parameter for the moments and the sums that give d, 16 for the update. But an update
uses the d from before the step, and the new one only in `d * eps`. So once d no longer rises, which is most of a
training run, the first pass updates the parameters, too (40 bytes in all). The second pass does nothing, unless
d has risen: then it corrects the update.
"""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import prodigyopt
import torch
from torch import Tensor

from trainer.prodigy.kernels import (
    DLR,
    DLR_D,
    MODE,
    NEW_EPS,
    RATE1,
    RATE2,
    RATE3,
    SCALE,
    SHRINK,
    Constants,
    Kernel,
    check_state,
    has_kernels,
    is_plain,
)

# Values that prodigyopt keeps in every parameter group and changes in step().
_SCALARS = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")


class _Operations:
    """One parameter, updated by PyTorch's own operations: any layout, any float type, any device.

    A skipped update multiplies by one and adds zeros that were selected (NaN x 0 would be NaN).
    """

    def __init__(self, row: tuple[Tensor, ...]) -> None:
        self.grad, self.param, self.p0, self.exp_avg, self.exp_avg_sq, self.s = row

    def _gradient(self, c: Tensor, const: Constants) -> Tensor:
        gradient = self.grad / c[SCALE]
        if const.l2:
            gradient.add_(self.param, alpha=const.l2)
        return torch.where(c[MODE] != 0, gradient, 0.0)

    def first_pass(self, c: Tensor, const: Constants) -> Tensor:
        """Moments and s; returns (numerator, denominator) as float64."""
        c = c.to(self.param.dtype)
        run, rates = c[MODE] != 0, torch.where(c[MODE] != 0, c, 0.0)
        beta1, beta2, beta3 = (c.new_full((), b).where(run, 1.0) for b in (const.beta1, const.beta2, const.beta3))
        gradient = self._gradient(c, const)
        sliced = gradient.flatten()[:: const.slice_p]
        away = self.p0 - self.param.flatten()[:: const.slice_p]
        if const.beta1 > 0:
            self.exp_avg.mul_(beta1).addcmul_(gradient, rates[RATE1])
        self.exp_avg_sq.mul_(beta2).addcmul_(gradient * rates[RATE2], gradient)
        self.s.mul_(beta3).addcmul_(sliced, rates[RATE3])
        return torch.stack((torch.dot(sliced, away), self.s.abs().sum())).double()

    def second_pass(self, c: Tensor, const: Constants) -> None:
        """Update the parameter with the new d."""
        c = c.to(self.param.dtype)
        rates = torch.where(c[MODE] != 0, -c, 0.0)
        if const.decay:
            self.param.addcmul_(self.param, rates[SHRINK])
        momentum = const.beta1 > 0
        change = self.exp_avg * rates[DLR] if momentum else self._gradient(c, const) * rates[DLR_D]
        self.param.add_(change.div_(self.exp_avg_sq.sqrt().add_(c[NEW_EPS])))


class _Part:
    """One group's part of a step: its parameters with a gradient, by kernel where possible."""

    def __init__(
        self, group: dict[str, Any], const: Constants, rows: Sequence[tuple[Tensor, ...]], use_kernels: bool
    ) -> None:
        self.group, self.const, self.rows = group, const, rows
        # The kernels don't support a beta1 of 0, for which there is no exp_avg. State has its parameter's layout.
        use_kernels = use_kernels and const.beta1 > 0 and bool(rows)
        plain = [use_kernels and is_plain(row[1]) and is_plain(row[0]) for row in rows]
        if any(plain) and not has_kernels(rows[0][1].device):
            plain = [False] * len(rows)
        by_kernel = [row for row, yes in zip(rows, plain, strict=True) if yes]
        for row in by_kernel:
            check_state(row, const.slice_p)
        self.kernel = Kernel(by_kernel) if by_kernel else None
        self.operations = [_Operations(row) for row, yes in zip(rows, plain, strict=True) if not yes]

    def coefficients(self, mode: Tensor, scale: Tensor, d: Tensor, dlr: Tensor, new_d: Tensor) -> Tensor:
        """The coefficients of the passes, in the order of MODE to DLR_D; float64."""
        group, const = self.group, self.const
        rate3 = d / group["d0"] * (d if group["safeguard_warmup"] else dlr)
        own = dlr * group.get("lr_factor", 1.0)
        rates = (d * (1 - const.beta1), d * d * (1 - const.beta2), rate3, own, const.decay * own)
        return torch.stack((mode, scale, *rates, d * group["eps"], new_d * group["eps"], own * new_d))

    def first_pass(self, c: Tensor) -> Tensor:
        """Returns (numerator, denominator) of d, summed over the group."""
        sums = [operations.first_pass(c, self.const) for operations in self.operations]
        if self.kernel is not None:
            sums.append(self.kernel.first_pass(c, self.const))
        return torch.stack(sums).sum(0)

    def second_pass(self, c: Tensor, go: Tensor, kernel_mode: Tensor) -> None:
        """Update the parameters where go is 1; kernel_mode is the kernel's mode there."""
        for operations in self.operations:
            operations.second_pass(torch.cat((go.reshape(1), c[1:])), self.const)
        if self.kernel is not None:
            self.kernel.second_pass(torch.cat(((go * kernel_mode).reshape(1), c[1:])))


class Prodigy(prodigyopt.Prodigy):  # type: ignore[misc]
    """Prodigy (Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner").

    Arguments, numbers and state dict are those of `prodigyopt.Prodigy` 1.1.2, which documents them. A
    checkpoint of either can be continued with the other. Differences:

    - Nothing in `step()` waits for the device. After the first step `param_groups[i]["d"]` (and d_max,
      d_numerator, d_denom, d_hat, k) hold 0-dimensional float64 tensors on the device, new ones each step, so
      that a stored one doesn't change. `d_on_device()` returns d. Only `state_dict()` reads them on the
      host, all at once, and gives floats and ints. Setting one to a float works.
    - `found_inf` (float tensor; None or unset: 0): 1 skips the update: parameters, state and d stay as they
      are, whatever the gradients hold. `grad_scale` (tensor; None or unset: 1): gradients are divided by it. As
      with PyTorch's fused optimizers they are valid until changed, and `torch.amp.GradScaler` sets them.
    - A group may have an `lr_factor`: its parameters w are trained as prodigyopt would train w / lr_factor, with the
      group's eps and weight decay times lr_factor. So the factor scales updates and decay, and d stays an estimate of
      one distance over all groups.
    - Gradients are never written to. (prodigyopt adds coupled weight decay to `p.grad`.)
    - `p0` is kept whole until the first `state_dict()`, which replaces it by a 0-dimensional zero for parameters
      that began as zeros; prodigyopt does so at once, and waits for the device.

    Raises ValueError for `fsdp_in_use` and for parameters on several devices; RuntimeError for learning rates
    that differ and are not 0.
    """

    _step_supports_amp_scaling = True
    # May be unset, as in PyTorch's fused optimizers: GradScaler multiplies a set value and deletes it afterwards.
    found_inf: Tensor | None
    grad_scale: Tensor | None
    # False: PyTorch's own operations only, as a reference for the kernels and as a workaround.
    use_kernels = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # prodigyopt prints
            super().__init__(*args, **kwargs)
        if any(group["fsdp_in_use"] for group in self.param_groups):
            raise ValueError("fsdp_in_use=True: sharded parameters are not supported; use prodigyopt.Prodigy")
        # Parameter -> whether it began with a value other than zeros; computed on the device, read by state_dict().
        self._began_nonzero: dict[Tensor, Tensor] = {}
        self._last_learning: list[int] | None = None

    def d_on_device(self) -> Tensor:
        """The step size estimate d (0-dimensional, float64), without waiting for the device."""
        head = self.param_groups[0]
        return _on_device(head["d"], head["params"][0].device)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients (0-dimensional, on the device), in one pass and without waiting."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        on_cpu = self.use_kernels and all(g.device.type == "cpu" and is_plain(g) for g in grads)
        if grads and on_cpu and has_kernels(grads[0].device):
            return Kernel([(g,) * 6 for g in grads]).norm()
        return torch.nn.utils.get_total_norm(grads)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; returns the closure's loss, or None without a closure."""
        loss = None if closure is None else closure()
        lr = max(group["lr"] for group in self.param_groups)
        if any(group["lr"] not in (lr, 0.0) for group in self.param_groups):
            rates = [group["lr"] for group in self.param_groups]
            raise RuntimeError(f"lr {rates}: Prodigy needs one lr for all groups, or 0 to freeze one")
        with torch.no_grad():
            parts = [self._part(group) for group in self.param_groups]
            # Without a gradient to learn from, prodigyopt leaves everything as it is.
            if any(part.const.learns and part.rows for part in parts):
                self._update(lr, [part for part in parts if part.rows])
        return loss

    def _update(self, lr: float, parts: list[_Part]) -> None:
        head, const = self.param_groups[0], parts[0].const
        old = {key: _on_device(head.get(key, 0.0), parts[0].rows[0][1].device) for key in _SCALARS}
        d, one = old["d"], torch.ones_like(old["d"])
        dlr = d * lr
        if head["use_bias_correction"]:
            count = old["k"] + 1
            dlr = dlr * ((1 - const.beta2**count) ** 0.5 / (1 - const.beta1**count))
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        run = one if found_inf is None else (found_inf.reshape(()) == 0).double()
        scale = one if grad_scale is None else grad_scale.reshape(()).double()
        at_once = self._may_update_at_once(parts, old)

        numerator, denominator = old["d_numerator"] * const.beta3, torch.zeros_like(d)
        for part in parts:
            if part.const.learns:
                sums = part.first_pass(part.coefficients(run * (1 + at_once), scale, d, dlr, d))
                numerator = numerator + d / part.group["d0"] * dlr * sums[0]
                denominator = denominator + sums[1] * part.group.get("lr_factor", 1.0)
        go = run * (denominator != 0)
        new = self._next_scalars(old, numerator, denominator)
        correct = 2 * (new["d"] != d)
        for part in parts:
            mode = torch.where(at_once == 1, correct, 1) if part.const.learns else one
            part.second_pass(part.coefficients(one, scale, d, dlr, new["d"]), go, mode)
            # A list, because with one tensor for all PyTorch reads it on the host.
            torch._foreach_add_([self.state[row[1]]["step"] for row in part.rows], [go] * len(part.rows))
        scalars = {key: torch.where(go == 1, value, old[key]) for key, value in new.items()}
        for group in self.param_groups:
            group.update(scalars, k=_on_device(group["k"], d.device) + go)

    def _may_update_at_once(self, parts: list[_Part], old: dict[str, Tensor]) -> Tensor:
        """1 if the first pass should update the parameters, else 0. It should once d has risen, and rises no longer.

        While d rises at every step, a correction costs more than it saves. It also rounds once more, which early
        on, when d is below a rounding error of the parameters, would change d.
        With a d_denom of 0 prodigyopt leaves the parameters alone; d_denom can't become 0 where it was not and
        the same parameters learn, for s only decays.
        """
        learning = [id(row[1]) for part in parts if part.const.learns for row in part.rows]
        same = self._last_learning in (None, learning)
        self._last_learning = learning
        if not same:
            return torch.zeros_like(old["d"])
        d0: float = self.param_groups[-1]["d0"]
        at_rest = (old["d"] == old["d_max"]) & (old["d_hat"] < old["d"]) & (old["d"] > d0)
        return torch.logical_and(at_rest, old["d_denom"] != 0).double()

    def _next_scalars(self, old: dict[str, Tensor], numerator: Tensor, denominator: Tensor) -> dict[str, Tensor]:
        """The scalars after the step. Comparisons follow Python's max and min: a NaN d_hat is never chosen."""
        head, d = self.param_groups[0], old["d"]
        d_hat = head["d_coef"] * numerator / denominator
        started = torch.where((d == self.param_groups[-1]["d0"]) & (d_hat > d), d_hat, d)
        d_max = torch.where(d_hat > old["d_max"], d_hat, old["d_max"])
        grown = started * head["growth_rate"]
        new_d = torch.where(grown < d_max, grown, d_max)
        return {"d": new_d, "d_max": d_max, "d_numerator": numerator, "d_denom": denominator, "d_hat": d_hat}

    def _part(self, group: dict[str, Any]) -> _Part:
        head = self.param_groups[0]
        beta1, beta2 = head["betas"]
        beta3 = math.sqrt(beta2) if head["beta3"] is None else head["beta3"]
        decay, decouple = group["weight_decay"], head["decouple"]
        l2, decay = (0.0, decay) if decouple else (decay, 0.0)
        const = Constants(beta1, beta2, beta3, l2, decay, group["slice_p"], group["lr"] > 0)
        rows: list[tuple[Tensor, ...]] = []
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p] or self._start(p, beta1, const.slice_p)
                exp_avg_sq = state["exp_avg_sq"]
                rows.append((p.grad, p, state["p0"], state.get("exp_avg", exp_avg_sq), exp_avg_sq, state["s"]))
        return _Part(group, const, rows, self.use_kernels)

    def _start(self, p: Tensor, beta1: float, slice_p: int) -> dict[str, Any]:
        first = next(p for group in self.param_groups for p in group["params"])
        if p.device != first.device:
            raise ValueError(f"parameters on {first.device} and {p.device}: Prodigy needs them on one device")
        p0 = p.detach().flatten()[::slice_p].clone()
        state: dict[str, Any] = self.state[p]
        state.update(step=_on_device(0, p.device), s=torch.zeros_like(p0), p0=p0)
        if beta1 > 0:
            state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
        self._began_nonzero[p] = p.any()
        return state

    def state_dict(self) -> dict[str, Any]:
        """As prodigyopt's: step and k are ints, the other scalars floats. The only method that waits for the device."""
        flags = list(self._began_nonzero.items())
        for (p, _), nonzero in zip(flags, _read([flag for _, flag in flags]), strict=True):
            if not nonzero:
                self.state[p]["p0"] = torch.zeros((), dtype=p.dtype, device=p.device)
        self._began_nonzero.clear()

        packed = super().state_dict()
        groups = [dict(group) for group in packed["param_groups"]]
        states = {key: dict(state) for key, state in packed["state"].items()}
        live = [(place, key) for place in groups for key in _SCALARS if isinstance(place.get(key), Tensor)]
        live += [(state, "step") for state in states.values()]
        for (place, key), value in zip(live, _read([place[key] for place, key in live]), strict=True):
            place[key] = int(value) if key in ("k", "step") else value
        return {**packed, "param_groups": groups, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from prodigyopt's state dict or this class's own."""
        super().load_state_dict(state_dict)
        self._began_nonzero.clear()
        self._last_learning = None
        for p, state in self.state.items():
            state["step"] = _on_device(state["step"], p.device)
            if p.is_contiguous():  # then the kernels need contiguous state
                state.update({key: t.contiguous() for key, t in state.items() if isinstance(t, Tensor)})


def _on_device(value: Tensor | float, device: torch.device) -> Tensor:
    """A 0-dimensional float64 tensor; torch.full, because copying a number from the host would wait."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def _read(scalars: list[Tensor]) -> list[float]:
    """The values of 0-dimensional tensors, in one copy."""
    return torch.stack([scalar.double() for scalar in scalars]).tolist() if scalars else []
