"""The one engine: a policy, an E-rollout drawn from it, and an update, turned into a :class:`ProbeResult`.

Model passes and arithmetic are apart: :meth:`EntropyProbe.collect` scores, :meth:`EntropyProbe.reduce` estimates, and
:meth:`EntropyProbe.measure` does both. Whoever wants other estimates of the same scores reduces them again.
"""

from entropy_pl.probe.cost import ProbeMemory, probe_memory
from entropy_pl.probe.dry_run import take_dry_run
from entropy_pl.probe.engine import EntropyProbe
from entropy_pl.probe.memory import PeakMemory, peak_memory, what_happened
from entropy_pl.probe.result import Counterfactual, ProbeResult, SweepPoint, SymmetricPoint
from entropy_pl.probe.sampler_gate import SamplerGap, SamplerGate, SamplerMismatchError, sampler_gap
from entropy_pl.probe.scores import ProbeScores
from entropy_pl.probe.settings import ATTRIBUTION_PASSES, AttributionSettings, Precision, ProbeSettings
from entropy_pl.probe.smoothness import WithheldError
from entropy_pl.probe.step import AttributedStep, MeasuredStep, StepMeasurement
from entropy_pl.probe.timing import timed

__all__ = [
    "ATTRIBUTION_PASSES",
    "AttributedStep",
    "AttributionSettings",
    "Counterfactual",
    "EntropyProbe",
    "MeasuredStep",
    "PeakMemory",
    "Precision",
    "ProbeMemory",
    "ProbeResult",
    "ProbeScores",
    "ProbeSettings",
    "SamplerGap",
    "SamplerGate",
    "SamplerMismatchError",
    "StepMeasurement",
    "SweepPoint",
    "SymmetricPoint",
    "WithheldError",
    "peak_memory",
    "probe_memory",
    "sampler_gap",
    "take_dry_run",
    "timed",
    "what_happened",
]
