"""What a module is asked, plain and offloaded: outputs, gradients, values, writes, copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tests.zoo.comparing import freeze, leaves_of
from tests.zoo.registry import Entry, Expected, Interrupted


def run_all(module: nn.Module, entry: Entry) -> Iterator[tuple[str, Any]]:
    """Use ``module`` in every way; each outcome under a name."""
    inputs = seeded(entry.inputs)
    module.eval()
    with torch.no_grad():
        for number, args in enumerate([*inputs, *inputs, inputs[0]]):
            yield f"no_grad {number}", _call(module, args)
    yield "tensors", tensors_of(module)
    with torch.inference_mode():
        for number, args in enumerate([*inputs, inputs[0]]):
            yield f"inference {number}", _call(module, args)
    if entry.grads:
        module.train()
        for number, args in enumerate([inputs[0], inputs[-1]]):
            yield f"train {number}", _train(module, args)
        yield "after training", tensors_of(module)
        module.eval()
    if entry.edits:
        yield from _edit(module)
    with torch.no_grad():
        for number, args in enumerate([*inputs, inputs[0]]):
            yield f"again {number}", _call(module, args)
    if entry.copies:
        yield from _copies(module, inputs[0])


def _train(module: nn.Module, args: Any) -> Any:
    out = _call(module, args)
    total: Any = 0
    for tensor in leaves_of(out):
        if tensor.requires_grad:
            total = total + tensor.abs().double().sum() + (tensor.abs().double() ** 2).mean()
    if not isinstance(total, Tensor):
        return freeze(out)
    cast(Any, total).backward()
    gradients = {n: freeze(p.grad) for n, p in module.named_parameters()}
    trained = [p for p in module.parameters() if p.requires_grad and p.grad is not None]
    if trained:
        torch.optim.SGD(trained, lr=0.01, momentum=0.9).step()
    module.zero_grad()
    return freeze(out), freeze(total), gradients


def _edit(module: nn.Module) -> Iterator[tuple[str, Any]]:
    parameters = [p for p in module.parameters() if p.is_floating_point() and type(p).__torch_function__ is not None]
    with torch.no_grad():
        for parameter in parameters[:2]:
            parameter.add_(0.25)
        for parameter in parameters[2:4]:
            parameter.data.mul_(0.5)
        for parameter in parameters[-1:]:
            parameter.data.copy_(parameter.flip(0) if parameter.dim() else parameter * 2)
            parameter.data = parameter.detach() * 0.5
    yield "edited", tensors_of(module)


def _copies(module: nn.Module, args: Any) -> Iterator[tuple[str, Any]]:
    twin = copy.deepcopy(module)
    with torch.no_grad():
        yield "twin", _call(twin, args)
    yield "twin is plain", {n: _kind(t) for n, t in named_tensors(twin)}
    state = module.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    # what the zoo saved itself: custom classes are among it
    saved = torch.load(file, weights_only=False)
    yield "saved", freeze(dict(saved))
    changed = {k: _changed(v) for k, v in saved.items()}
    yield "keys", [str(k) for k in module.load_state_dict(changed)]
    yield "loaded", tensors_of(module)
    with torch.no_grad():
        yield "after loading", _call(module, args)


def _changed(value: Any) -> Any:
    return value * 0.5 if isinstance(value, Tensor) and value.is_floating_point() and type(value) is Tensor else value


def _call(module: nn.Module, args: Any) -> Any:
    torch.manual_seed(7)
    try:
        out = module(*copy.deepcopy(args))
    except (Expected, Interrupted) as error:
        return f"raised {error}"
    return out if torch.is_grad_enabled() else freeze(out)


def tensors_of(module: nn.Module) -> dict[str, Any]:
    """All that can be seen of a module's tensors, and their values in several ways."""
    seen: dict[str, Any] = {
        f"vars of {n}": sorted(vars(m).keys() - {"_apply", "forward"}) for n, m in module.named_modules()
    }
    for name, tensor in named_tensors(module):
        seen[name] = (
            tuple(tensor.shape),
            tensor.dtype,
            tensor.stride(),
            str(tensor.device),
            tensor.requires_grad,
            tensor.is_leaf,
            tensor.is_contiguous(),
            isinstance(tensor, nn.Parameter),
            sorted(k for k in tensor.__dict__ if not k.startswith("_tierstore")),
            freeze(tensor),
        )
        if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ or "Ghost" in type(tensor).__name__:
            seen[f"{name} list"] = freeze(torch.tensor(tensor.detach().tolist()))
            if tensor.dtype not in (torch.bfloat16,):
                seen[f"{name} numpy"] = tensor.detach().numpy().tobytes()
            if tensor.numel() == 1:
                seen[f"{name} item"] = tensor.item()
    return seen


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        yield f"buffer {name}", buffer


def _kind(tensor: Tensor) -> str:
    return type(tensor).__name__


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return make()
