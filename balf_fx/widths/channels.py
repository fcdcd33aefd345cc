"""Channels: features that pass from layer to layer through operations that treat each feature separately.

A `Space` is grown from one value. A layer may output several values for each feature, such as a gate and what it
scales: its output is another space, of which nodes of the first one read parts (`widths.moves`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from balf_fx.graph.annotation import annotation
from balf_fx.graph.layers import site_input
from balf_fx.graph.widths import Reader, Width
from balf_fx.widths.following import Finder, site_axis
from balf_fx.widths.spaces import Space, UnsupportedError

_LEAST = 8  # the least number of features that is worth reducing


def find_channels(graph_module: fx.GraphModule) -> Iterator[Width]:
    """The widths of kind "channels" in an annotated and profiled graph."""
    yield from channels_of(Finder(graph_module))


def channels_of(finder: Finder) -> Iterator[Width]:
    """The widths that a finder finds in its graph."""
    seen: set[fx.Node] = set()
    for node in finder.graph_module.graph.nodes:
        site = annotation(node).site
        if site is None or not finder.is_layer(node, site):
            continue
        source = site_input(node)
        shape = annotation(source).shape
        if source in seen or shape is None:
            continue
        features = finder.inputs(site)
        try:
            space = finder.grow(source, site_axis(site, shape), features)
            wide = finder.grow_wide(space)
        except UnsupportedError:
            continue
        seen.update(space.axes)
        width = _width(finder, space, wide)
        if width is not None:
            yield width


def _width(finder: Finder, space: Space, wide: Sequence[Space]) -> Width | None:
    """The width of a space, if it lies between layers that may change."""
    features = space.features
    held, read = _held(finder, space) if space.joined else ((), ())
    consumers = sorted(space.consumers, key=lambda n: -(annotation(n).flops or 0))
    written = [(producer, tuple(range(len(space.held[producer])))) for producer in space.producers]
    for each in wide:
        parts = sorted(dict.fromkeys(rows for own in space.selections for rows in own.rows if own.source in each.axes))
        written += [(producer, rows) for producer in each.producers for rows in parts]
    layers = {producer for producer, _ in written}
    site = annotation(consumers[0]).site if consumers else None
    if features < _LEAST or not layers or site is None:
        return None
    return Width(
        "channels",
        site.name,
        features,
        producers=tuple(producer.name for producer, _ in written),
        consumers=tuple(consumer.name for consumer in consumers),
        rows=tuple(rows for _, rows in written),
        between=tuple(node.name for node in space.between),
        fused=tuple(node.name for each in wide for node in each.between),
        fused_layer=next((each.producers[0].name for each in wide if each.between), ""),
        readers=tuple(_reader(own.reader, own.source, wide) for own in space.selections if own.reader is not None),
        sizes=tuple(size for each in (space, *wide) for size in each.sizes),
        views=(*space.views(), *(view for each in wide for view in each.views(each.producers[0].name))),
        held=held,
        read=read,
        step=space.block,
        block=space.block,
    )


_Held = tuple[tuple[str, tuple[int, ...]], ...]
"""As `Width.held` and `Width.read`."""


def _held(finder: Finder, space: Space) -> tuple[_Held, _Held]:
    """The features that nodes of a space output or process, and that they read, where these are not all.

    They are in the order of the names of the layers that output them: other graphs of the same model may be walked in
    another order.
    """
    producers = sorted(space.producers, key=finder.layer_name)
    order = dict.fromkeys(feature for producer in producers for feature in space.held[producer])
    number = {feature: index for index, feature in enumerate(order)}

    def numbered(values: Mapping[fx.Node, fx.Node]) -> _Held:
        found = ((node.name, tuple(number[each] for each in space.held[value])) for node, value in values.items())
        return tuple((name, held) for name, held in found if held != tuple(range(space.features)))

    written = {node: next(iter(node.users)) if node.op == "get_attr" else node for node in space.between}
    written |= {node: node for node in space.producers}
    return numbered(written), numbered({node: site_input(node) for node in space.consumers})


def _reader(reader: Reader, source: fx.Node, wide: Sequence[Space]) -> Reader:
    """The reader with the layers that output what it reads."""
    layers = (producer.name for each in wide if source in each.axes for producer in each.producers)
    return dataclasses.replace(reader, layers=tuple(layers))
