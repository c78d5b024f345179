"""Networks that differ from the official one in a detail, as other implementations do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from refinedet_cli.core.backbones import build_backbone
from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, NetworkConfig
from refinedet_cli.core.layers import TransferConnectionBlock
from refinedet_cli.core.presets import tiny


def random_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("up", "reach"), [("2x2", 2), ("3x3", 3)])
def test_either_deconvolution_doubles_the_resolution_and_one_overlaps(up, reach):
    block = TransferConnectionBlock(4, 4, coarser=True, norm="none", up=up)
    assert block.up is not None
    with torch.no_grad():
        nn.init.ones_(block.up[0].weight)
        nn.init.zeros_(block.up[0].bias)
        for height, width in ((1, 1), (3, 5)):
            assert block.up(random_of(1, 4, height, width)).shape == (1, 4, 2 * height, 2 * width)
            features = random_of(1, 4, 2 * height, 2 * width)
            assert block(features, random_of(1, 4, height, width)).shape == features.shape
        one = torch.zeros(1, 4, 5, 5)
        one[0, 0, 2, 2] = 1
        assert int((block.up(one)[0, 0] > 0).sum()) == reach**2


def test_the_coarsest_block_may_be_linear():
    torch.manual_seed(0)
    blocks = {top: TransferConnectionBlock(4, 4, coarser=False, norm="none", top=top) for top in ("relu", "linear")}
    blocks["linear"].load_state_dict(blocks["relu"].state_dict())
    features = random_of(1, 4, 6, 6)
    with torch.no_grad():
        lateral = blocks["relu"].second(blocks["relu"].first(features))
        assert torch.equal(blocks["linear"](features, None), blocks["linear"].last[0](lateral))
        assert float(blocks["linear"](features, None).min()) < 0 <= float(blocks["relu"](features, None).min())
    finer = TransferConnectionBlock(4, 4, coarser=True, norm="none", top="linear")
    assert isinstance(finer.last[-1], nn.ReLU)  # the setting is about the coarsest one alone


def test_fc6_is_dilated_as_asked():
    with torch.device("meta"):
        layers = [build_backbone(NetworkConfig(backbone="vgg16", fc6_dilation=d)).fc6[0] for d in (3, 6)]
    assert [(layer.dilation, layer.padding) for layer in layers] == [((3, 3), (3, 3)), ((6, 6), (6, 6))]


def test_a_network_of_all_variants_trains():
    config = tiny(Classes(names=("a",), category_ids=(1,))).detector
    network = build(replace(config, network=replace(config.network, tcb_up="3x3", tcb_top="linear"))).network
    raw = network(random_of(2, 3, 64, 64))
    sum(t.square().mean() for t in (raw.arm_logits, raw.arm_offsets, raw.odm_logits, raw.odm_offsets)).backward()
    assert all(p.grad is not None for name, p in network.named_parameters() if name.startswith("tcb"))
