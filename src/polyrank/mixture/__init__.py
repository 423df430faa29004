"""The mixture core: a small core between two thin linear maps, beside a frozen layer.

    y = W x + b + s * B' C(x, t) A x

Three nouns. *Experts* own A, B and how gates act on the ranks between them; a *router* gives logits from the input and
the task; a *gate* turns logits into weights. Everything that makes methods differ happens on (tokens, R) tensors.

Legend of the shape comments: B batch, L sequence, N tokens (all leading dimensions), I / O in / out features,
E experts, R rank of all experts together (rows of A), T tasks. Leading dimensions are free: ``...`` is any of them.
"""

from .balance import (
    global_notes as global_notes,
    global_sum as global_sum,
    load_balance as load_balance,
    mutual_information as mutual_information,
)
from .base import (
    in_out_features as in_out_features,
    is_linear as is_linear,
    is_plain as is_plain,
    runs_primitives as runs_primitives,
    weight_of as weight_of,
)
from .context import RouteContext as RouteContext
from .experts import (
    Experts as Experts,
    LoRAExperts as LoRAExperts,
    Pairs as Pairs,
    SharedDownExperts as SharedDownExperts,
    SingularExperts as SingularExperts,
    TaskExperts as TaskExperts,
)
from .feedforward import FeedForward as FeedForward, FeedForwardMixture as FeedForwardMixture
from .gates import (
    Around as Around,
    Gate as Gate,
    JointTopK as JointTopK,
    NaiveShared as NaiveShared,
    Softmax as Softmax,
    SoftmaxTopK as SoftmaxTopK,
    Watched as Watched,
)
from .kept import Kept as Kept, drop_kept as drop_kept, infers as infers
from .linear import (
    Mixture as Mixture,
    add as add,
    context_of as context_of,
    run as run,
)
from .low_rank import (
    BY_TASK as BY_TASK,
    LowRankMixture as LowRankMixture,
    MixtureLinear as MixtureLinear,
)
from .primitives import (
    base_shrink as base_shrink,
    compute_dtype as compute_dtype,
    exactly as exactly,
    expand_ as expand_,
)
from .reflections import Reflections as Reflections
from .route import Note as Note, Route as Route
from .routers import (
    LinearRouter as LinearRouter,
    PerTaskRouter as PerTaskRouter,
    Router as Router,
    SampleRouter as SampleRouter,
    Sum as Sum,
    TaskEmbedding as TaskEmbedding,
    TaskLogits as TaskLogits,
    TokenRouter as TokenRouter,
    exact_linear as exact_linear,
    for_samples as for_samples,
)
from .site import Site as Site
from .start import (
    TaskTable as TaskTable,
    adapter_dtype as adapter_dtype,
    normal as normal,
    place as place,
    uniform as uniform,
    zeros as zeros,
)
