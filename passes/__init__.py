"""The compiler passes, in the order in which `balf_fx.compile` runs them.

Each pass takes a GraphModule and returns a `PassResult`. Its options are fields of a frozen dataclass. A pass can be
used alone or inside any `torch.fx` PassManager. It modifies the graph that it is given.
"""

if __name__ != "balf_fx.passes":  # a second copy of every class under another name would match nothing
    raise ImportError("the passes are imported as balf_fx.passes")

from balf_fx.passes.align import Align
from balf_fx.passes.allocate import Allocate
from balf_fx.passes.annotate import Annotate
from balf_fx.passes.base import Pass
from balf_fx.passes.decompose_attention import DecomposeAttention
from balf_fx.passes.factorize import Factorize
from balf_fx.passes.find_pivots import FindPivots
from balf_fx.passes.find_widths import FindWidths
from balf_fx.passes.fold_batchnorm import FoldBatchNorm
from balf_fx.passes.fold_constants import FoldConstants
from balf_fx.passes.fold_layer_scale import FoldLayerScale
from balf_fx.passes.follow import Follow
from balf_fx.passes.narrow import Narrow
from balf_fx.passes.observe import InsertObservers, RemoveObservers
from balf_fx.passes.overwrite import Overwrite
from balf_fx.passes.pivot import Pivot
from balf_fx.passes.refine import Refine
from balf_fx.passes.refit import Refit
from balf_fx.passes.scale_logits import ScaleLogits
from balf_fx.passes.score import Score
from balf_fx.passes.score_widths import ScoreWidths
from balf_fx.passes.split_bias import SplitBias
from balf_fx.passes.time import Time
from balf_fx.passes.unify_products import UnifyProducts

__all__ = [  # noqa: RUF022 (in the order in which they run)
    "Pass",
    "DecomposeAttention",
    "FoldConstants",
    "UnifyProducts",
    "FoldBatchNorm",
    "FoldLayerScale",
    "Annotate",
    "FindWidths",
    "InsertObservers",
    "Align",
    "FindPivots",
    "Score",
    "ScoreWidths",
    "Time",
    "Allocate",
    "Follow",
    "Refine",
    "Refit",
    "RemoveObservers",
    "Pivot",
    "Narrow",
    "Factorize",
    "SplitBias",
    "Overwrite",
    "ScaleLogits",
]
