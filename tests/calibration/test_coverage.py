import torch
from expert_models import INPUTS, OUTPUTS, Selected
from torch import nn

import balf_fx
from balf_fx.calibration.coverage import too_few, unseen
from balf_fx.capture.normal_form import capture
from balf_fx.graph.experts import read_experts
from balf_fx.graph.layers import read_site
from balf_fx.graph.site import Reason


class Branches(nn.Module):
    """Two layers that read the same value."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_an_expert_needs_a_quarter_of_its_full_rank():
    torch.manual_seed(0)
    graph_module = capture(Selected(inputs_first=False).eval(), torch.randn(2, 5, INPUTS))
    (node,) = [each for each in graph_module.graph.nodes if read_experts(each) is not None]
    full = min(INPUTS, OUTPUTS)
    assert too_few(read_site(graph_module, node), torch.tensor([full / 4, full / 4 - 1, 0])) == [1, 2]


def test_sites_that_no_value_has_reached_are_refused():
    model, x = Branches().eval(), torch.randn(8, 16)
    prepared = balf_fx.prepare(model, x)
    assert unseen(prepared).keys() == {"first", "second"}
    balf_fx.calibrate(prepared, [x], progress=False)
    assert unseen(prepared) == {}
    fresh = balf_fx.prepare(model, x)
    assert {refusal.reason for refusal in unseen(fresh).values()} == {Reason.UNSEEN}
