"""Let transformers write what balf_fx did to a model."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from balf_fx.graph.plan import Plan


def describe(compressed: nn.Module, plan: Plan) -> None:
    """Let transformers write the plan and checksums into the model's folder, if it is a model of transformers."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is not None and isinstance(compressed, transformers.PreTrainedModel):
        from balf_fx.huggingface import quantizer  # only here: it imports transformers

        quantizer.describe(compressed, plan)
