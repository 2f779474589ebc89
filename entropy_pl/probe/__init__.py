"""The one engine: a policy, an E-rollout drawn from it, and an update, turned into a :class:`ProbeResult`.

Model passes and arithmetic are apart: :meth:`EntropyProbe.collect` scores, :meth:`EntropyProbe.reduce` estimates, and
:meth:`EntropyProbe.measure` does both. Whoever wants other estimates of the same scores reduces them again.
"""

from entropy_pl.probe.cost import ProbeMemory, probe_memory
from entropy_pl.probe.dry_run import take_dry_run
from entropy_pl.probe.engine import ATTRIBUTION_PASSES, EntropyProbe
from entropy_pl.probe.memory import PeakMemory, peak_memory, what_happened
from entropy_pl.probe.result import Counterfactual, ProbeResult, SweepPoint, SymmetricPoint
from entropy_pl.probe.scores import ProbeScores
from entropy_pl.probe.settings import Precision, ProbeSettings
from entropy_pl.probe.timing import timed

__all__ = [
    "ATTRIBUTION_PASSES",
    "Counterfactual",
    "EntropyProbe",
    "PeakMemory",
    "Precision",
    "ProbeMemory",
    "ProbeResult",
    "ProbeScores",
    "ProbeSettings",
    "SweepPoint",
    "SymmetricPoint",
    "peak_memory",
    "probe_memory",
    "take_dry_run",
    "timed",
    "what_happened",
]
