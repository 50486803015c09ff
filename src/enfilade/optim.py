"""What a stage does to a network's weights: which parts learn, at which rate, clipped how, and their moving average."""

import math

import torch
from torch import Tensor, nn

from enfilade.errors import UserError
from enfilade.stages import Stage


def part_of(network: nn.Module) -> dict[str, str]:
    """Parameter name -> part name."""
    owner = {}
    ids = {id(p): n for n, p in network.named_parameters()}
    for part, modules in network.parts.items():  # type: ignore[attr-defined]
        for module in modules:
            owner |= {ids[id(p)]: part for p in module.parameters()}
    lost = set(ids.values()) - owner.keys()
    if lost:
        raise ValueError(f"{type(network).__name__}.parts leaves out {sorted(lost)[:3]}")
    return owner


def freeze(network: nn.Module, stage: Stage) -> None:
    """Training mode, but for frozen parts: their parameters take no gradient and their batch norms do not move; nor do
    any in a stage with running `norms`."""
    network.train()
    parts: dict[str, list[nn.Module]] = network.parts  # type: ignore[assignment]
    unknown = {*stage.train, *stage.lr_parts, *stage.clip} - {"*"} - parts.keys()
    if unknown:
        raise UserError(f"stage {stage.name!r} names {sorted(unknown)}, which the model lacks: it has {sorted(parts)}")
    for part, modules in parts.items():
        learns = "*" in stage.train or part in stage.train
        for module in modules:
            module.requires_grad_(learns)
            if not learns:
                module.eval()
    if stage.norms == "running":
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                module.eval()


def make_optimiser(network: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    owner = part_of(network)
    groups: dict[tuple[str, bool], dict] = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1  # no weight decay on biases and batch norms
            group = groups.setdefault((owner[name], decays), {"params": [], "part": owner[name]})
            group["params"].append(p)
            group["weight_decay"] = stage.weight_decay if decays else 0.0
            group["lr"] = group["peak"] = stage.lr * stage.lr_parts.get(owner[name], 1.0)
    if not groups:
        raise UserError(f"stage {stage.name!r} trains nothing: its parts {stage.train} have no parameters")
    make = {
        "adamw": lambda g: torch.optim.AdamW(g, lr=stage.lr),
        "adam": lambda g: torch.optim.Adam(g, lr=stage.lr),
        "sgd": lambda g: torch.optim.SGD(g, lr=stage.lr, momentum=stage.momentum),
    }
    return make[stage.optimiser](list(groups.values()))


def learning_rate(stage: Stage, step: int, total: int, per_epoch: int) -> float:
    """Factor of the peak rate at update `step` of `total`."""
    t = step / max(1, total)
    if stage.schedule == "onecycle":
        if t < stage.warmup:
            return max(0.02, t / stage.warmup)
        return 0.5 * (1 + math.cos(math.pi * (t - stage.warmup) / (1 - stage.warmup))) + 1e-4
    if stage.schedule == "poly":
        return (1 - t) ** 0.9
    if stage.schedule == "step":
        return 0.1 ** (step // (per_epoch * stage.step_epochs))
    return 1.0


def clip(network: nn.Module, owner: dict[str, str], limits: dict[str, float]) -> dict[str, float]:
    """Clip each part's gradient to its norm; returns all parts' norms before clipping."""
    gradients: dict[str, list[Tensor]] = {}
    for name, p in network.named_parameters():
        if p.grad is not None:
            gradients.setdefault(owner[name], []).append(p.grad)
    norms = {}
    for part, grads in gradients.items():
        norms[part] = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        if part in limits and math.isfinite(norms[part]) and norms[part] > limits[part]:
            torch._foreach_mul_(grads, limits[part] / norms[part])
    return norms


class MovingAverage:
    """Exponential moving average of weights and batch-norm statistics; counters are copied."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # a young average must forget its random start
        now = network.state_dict()
        floats = [k for k, v in now.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.state[k] for k in floats], [now[k] for k in floats], 1 - decay)
        for k, v in now.items():
            if not v.is_floating_point():
                self.state[k].copy_(v)


class swapped:
    """Within it, the network holds the averaged weights."""

    def __init__(self, network: nn.Module, average: MovingAverage | None):
        self.network, self.average = network, average

    def __enter__(self) -> nn.Module:
        self.kept = {k: v.clone() for k, v in self.network.state_dict().items()}
        if self.average is not None:
            self.network.load_state_dict(self.average.state)
        return self.network

    def __exit__(self, *_) -> None:
        self.network.load_state_dict(self.kept)
