import pytest
import torch
from architectures import EVERYTHING, make, scored

from balf_fx.graph.annotation import graph_record, record_graph
from balf_fx.passes import Allocate
from balf_fx.widths.narrowing import Narrowed, find_cuts


@pytest.mark.parametrize("trailing", [(), (5,), (5, 2)])
def test_chosen_rows_are_what_a_one_hot_map_chooses(trailing):
    rows, kept = torch.randperm(12)[None, :8], torch.tensor([1, 4, 7])
    maps = torch.eye(8, dtype=torch.float64)[kept][None]
    value = torch.randn(12, *trailing)
    chosen = Narrowed(rows, kept=kept).of(value)
    assert torch.equal(chosen, value[rows[0, kept]])
    torch.testing.assert_close(chosen, Narrowed(rows, maps).of(value))


def test_rows_of_heads_are_combined_within_each_head():
    rows, maps = torch.randperm(12).reshape(3, 4), torch.randn(3, 2, 4)
    value = torch.randn(12, 5)
    wanted = torch.cat([own @ value[head] for head, own in zip(rows, maps, strict=True)])
    torch.testing.assert_close(Narrowed(rows, maps).of(value), wanted)


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_is_kept_is_known_wherever_features_are_chosen(name):
    model, batches = make(name)
    prepared = scored(model, batches)
    Allocate(ranks={})(prepared)
    record = graph_record(prepared)
    sizes = {width.key: width.features // 2 for width in record.widths}
    record_graph(prepared, allocation=type(record.allocation)("ranks", "flops", None, (), 0.0, None, sizes))
    cuts = find_cuts(prepared)
    for width, curve in zip(record.widths, record.width_curves, strict=True):
        for node in (*width.producers, *width.between):
            if width.kind == "channels":
                (own,) = cuts[node].written
                kept, held = curve.kept(sizes[width.key]).tolist(), width.held_by(node) or range(width.features)
                assert [held[place] for place in own.kept.tolist()] == [feature for feature in held if feature in kept]
                assert own.maps is None
            else:
                assert all(own.kept is None for own in cuts[node].written)
