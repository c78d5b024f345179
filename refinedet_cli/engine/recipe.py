"""What a recipe makes of a network: what is trained, at which rate, how averaged, on which pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from refinedet_cli.core.config import PreprocessConfig, TrainConfig
from refinedet_cli.data.loading import Plan


class Average:
    """Running average of weights; the early steps weigh more, so that a short run is not held at its random start."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {n: t.detach().clone() for n, t in network.state_dict().items()}

    def update(self, network: nn.Module, step: int) -> None:
        """Take one step's weights in; ``step`` counts from 1."""
        decay = min(self.decay, step / (step + 10))
        raw = network.state_dict()
        floating = [n for n, t in self.tensors.items() if t.is_floating_point()]
        torch._foreach_lerp_([self.tensors[n] for n in floating], [raw[n] for n in floating], 1 - decay)
        for name in self.tensors.keys() - set(floating):
            self.tensors[name].copy_(raw[name])


def milestone_steps(config: TrainConfig, steps: int) -> tuple[int, ...]:
    """Compute where the rate drops, in steps done.

    Returns:
        for a multistep schedule the first step at or after each fraction of the run; a fraction that is meant to be a
        whole number of steps (2/3 of 120,000) gives exactly that, however it was rounded. Empty for other schedules.
    """
    if config.schedule != "multistep":
        return ()
    return tuple(_first_step(fraction, steps) for fraction in config.milestones)


def _first_step(fraction: float, steps: int) -> int:
    """Count the steps before a fraction of the run is done; what was meant to be a whole number is that."""
    return math.ceil(fraction * steps - 1e-6)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Compute the factor on the base rate at a step.

    Args:
        config: schedule and warm-up.
        step: 0-based.
        steps: of the whole run.

    Returns:
        A factor in (0, 1]: it rises linearly over the warm-up, which is at most a tenth of the run, then follows the
        schedule.
    """
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "multistep":
        return config.gamma ** sum(step >= milestone for milestone in milestone_steps(config, steps))
    return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Group parameters by part and kind: biases are not decayed and get ``bias_lr``, normalisation has its own rule.

    The backbone, for ``backbone_lr``, is what its stages hold. Parameters that are never trained are left out; those
    that ``unfreeze`` frees later are in from the start, and untouched as long as they have no gradient. Each group's
    ``lr`` is multiplied by `learning_rate` at every step, and by nothing else.
    """
    norms = {
        id(p)
        for m in network.modules()
        if isinstance(m, (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm))
        for p in m.parameters()
    }
    backbone: Any = network.backbone
    pretrained = {id(p) for stage in backbone.stages() for p in stage.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by rate and decay
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = config.backbone_lr if id(parameter) in pretrained else 1.0
        is_norm, is_bias = id(parameter) in norms, name.endswith("bias")
        rate = config.lr * factor * (config.bias_lr if is_bias and not is_norm else 1.0)
        decays = config.decay_norm if is_norm else not is_bias
        groups.setdefault((rate, config.weight_decay if decays else 0.0), []).append(parameter)
    described = [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(described)
    return torch.optim.SGD(described, momentum=config.momentum)


def frozen_stages(config: TrainConfig, step: int, steps: int) -> int:
    """Tell how many of the backbone's stages, from the input up, are not trained at a step (0-based) of a run."""
    reached = [stages for fraction, stages in config.unfreeze if step >= _first_step(fraction, steps)]
    return min([config.freeze_stages, *reached])


def fewest_frozen(config: TrainConfig) -> int:
    """Tell how many stages are never trained in the whole run."""
    return min([config.freeze_stages, *(stages for _, stages in config.unfreeze)])


def freeze(network: nn.Module, config: TrainConfig, lowest: int) -> None:
    """Put the network into training mode, with its ``lowest`` stages and normalisation as configured fixed.

    It may be called again with fewer stages: what is no longer fixed is trained from then on.
    """
    network.train()
    backbone: Any = network.backbone
    stages = backbone.stages()
    for place, stage in enumerate(stages):
        stage.requires_grad_(place >= lowest)
        stage.train(place >= lowest)
    if config.freeze_norm:
        for module in (m for stage in stages for m in stage.modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
                module.requires_grad_(False)


def input_sizes(preprocess: PreprocessConfig, config: TrainConfig) -> Callable[[float], PreprocessConfig]:
    """Make the function that gives the preprocessing at a fraction of the run."""

    def at(done: float) -> PreprocessConfig:
        scale = next((s for until, s in sorted(config.small_input) if done < until), 1.0)
        if scale == 1.0:
            return preprocess
        height, width = (max(64, round(v * scale / 64) * 64) for v in (preprocess.height, preprocess.width))
        return replace(preprocess, height=height, width=width)

    return at


def make_plan(
    pictures: int, preprocess: PreprocessConfig, config: TrainConfig, weights: NDArray[np.float64] | None = None
) -> Plan:
    """Lay out the steps of a run over so many pictures, ``weights`` of which say how often they come."""
    sizes = input_sizes(preprocess, config)
    return Plan(pictures, config.batch, config.epochs, config.seed, sizes, steps=config.steps, weights=weights)
