"""The settings of an offline measurement, as its config file spells them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from entropy_pl.data.registry import check_template, get_dataset
from entropy_pl.estimators import Baseline
from entropy_pl.estimators.snis import Normalize, Weighting
from entropy_pl.groups import GroupSampler, ZeroAdvantage
from entropy_pl.objectives import AdvantageKind, AdvantageSign, LossSettings, LossType, RewardSum, intervened
from entropy_pl.policy import LoraSettings
from entropy_pl.policy.precision import MatmulPrecision
from entropy_pl.policy.settings import Dtype, Quantization
from entropy_pl.policy.tangents import Method
from entropy_pl.probe import AttributionSettings, EntropyProbe, Precision
from entropy_pl.reporting import LoggingSettings
from entropy_pl.rollout import checked_temperature


@dataclass(frozen=True)
class CheckpointSettings:
    """What is measured: a policy and where its next step comes from.

    Args:
        checkpoint_path: a PEFT adapter folder, a full model folder, a Lightning `.ckpt`, or a file of weights.
        optimizer_path: file of the optimizer's state. None takes what the checkpoint holds.
        after_checkpoint_path: a later checkpoint of the same run, of any trainer: then v = θ′ − θ, and neither
            optimizer nor U-batch is used. η = 1 is the whole way from one to the other.
        backbone: the base model: a backbone key, a hub name or a folder. None takes what the checkpoint names.
        lora: of a checkpoint that does not tell its own LoRA settings.
        quantization: `nf4` keeps the base model in 4 bits.
        dtype: of the base model's weights. None takes what the checkpoint says, else float32.
        device_map: placement by accelerate, as `auto` or `cuda:0`. None: the GPU where there is one, else the CPU.
    """

    checkpoint_path: str
    optimizer_path: str | None = None
    after_checkpoint_path: str | None = None
    backbone: str | None = None
    lora: LoraSettings | None = None
    quantization: Quantization | None = None
    dtype: Dtype | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.optimizer_path is not None and self.after_checkpoint_path is not None:
            raise ValueError(
                "expected optimizer_path or after_checkpoint_path, got both: the update is rebuilt from an optimizer's "
                "state, or is the difference of two checkpoints"
            )


@dataclass(frozen=True)
class BatchSettings:
    """The two batches, never mixed: E measures entropy, U makes the update.

    Args:
        dataset_name: a registered dataset: `gsm8k_r1_template`, `arithmetic_r1_template` or your own.
        dataset_path: local folder of the dataset. None takes the hub's.
        prompt_template: text around each question, must contain `{question}`. None takes the dataset's own.
        E_split: split of the E prompts.
        U_split: split of the U prompts, none of which is in E.
        B_E: sequences in the E-batch.
        B_U: prompts in the U-batch.
        G: completions of each U prompt.
        completions_per_prompt: how many sequences of the E-batch share a prompt, for one larger than its split; error
            bars are then clustered by prompt.
    """

    dataset_name: str = "gsm8k_r1_template"
    dataset_path: str | None = None
    prompt_template: str | None = None
    E_split: str = "test"
    U_split: str = "train"
    B_E: int = 256
    B_U: int = 16
    G: int = 8
    completions_per_prompt: int = 1

    def __post_init__(self) -> None:
        get_dataset(self.dataset_name)
        if self.prompt_template is not None:
            check_template(self.prompt_template)
        for name, least in (("B_E", 2), ("B_U", 1), ("G", 2), ("completions_per_prompt", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}")
        if self.B_E % self.completions_per_prompt or 2 * self.completions_per_prompt > self.B_E:
            raise ValueError(
                f"expected B_E to be completions_per_prompt times at least 2 prompts, got B_E={self.B_E} and "
                f"completions_per_prompt={self.completions_per_prompt}"
            )

    @property
    def e_prompts(self) -> int:
        """Prompts in the E-batch."""
        return self.B_E // self.completions_per_prompt


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn, E's and U's alike.

    Args:
        temperature: of sampling, of the log-probs in the loss, and of the entropy that is measured.
        max_new_tokens: longest completion.
        sample_batch_size: completions sampled at once. None takes up to 256.
        max_batch_tokens: padded tokens per scored micro-batch. None takes what the free memory and the device suggest.
        compile_statistics: make one kernel of softmax, log-prob and entropy by `torch.compile`.
    """

    temperature: float = 1.0
    max_new_tokens: int = 150
    sample_batch_size: int | None = None
    max_batch_tokens: int | None = None
    compile_statistics: bool = False

    def __post_init__(self) -> None:
        checked_temperature(self.temperature)
        for name in ("max_new_tokens", "sample_batch_size", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")


@dataclass(frozen=True)
class EstimatorSettings:
    """Which entropy, at which step sizes, by which estimator.

    Args:
        use_simple_entropy_for_x: take the surprisal -log-prob of the sampled token instead of the entropy at its
            prefix; more variance, same target.
        eta_sweep: measure at every η of `eta_list`; false: at `single_eta` alone.
        eta_list: absolute step sizes. None takes `eta_multipliers`.
        eta_multipliers: step sizes in multiples of the update's learning rate, where there is no `eta_list`.
        single_eta: the step size where there is no sweep. None takes the learning rate.
        symmetric: measure at -η too, for symmetric differences.
        normalize: `per_token` or `per_sequence`.
        weighting: `prefix` (per-decision importance weights, less variance) or `sequence` (classical).
        baseline: subtracted from the score term, in δH₁ and ΔH alike: `none`, `position`, `critic` or `gae`.
        gae_lambda: λ of `gae`, which is biased by its critic's error; 1 is the critic.
        clip_log_weight: bound on the absolute log weight. None leaves the estimate unbiased to O(1/N).
        confidence: of every interval.
        method: how derivatives are made: `auto`, `forward_mode` or `central_difference`.
    """

    use_simple_entropy_for_x: bool = False
    eta_sweep: bool = True
    eta_list: list[float] | None = None
    eta_multipliers: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    single_eta: float | None = None
    symmetric: bool = False
    normalize: Normalize = "per_token"
    weighting: Weighting = "prefix"
    baseline: Baseline = "none"
    gae_lambda: float = 0.95
    clip_log_weight: float | None = None
    confidence: float = 0.95
    method: Method = "auto"

    def __post_init__(self) -> None:
        if self.eta_sweep and self.single_eta is not None:
            raise ValueError(f"expected eta_sweep: false to go with single_eta={self.single_eta:g}, got true")
        if self.eta_list is not None and not self.eta_list:
            raise ValueError("expected at least one η in eta_list, got none: leave it out for eta_multipliers")
        self.probe()  # which checks the rest

    def probe(self, **others: Any) -> EntropyProbe:
        """The probe these settings mean; ``others`` are its arguments from other sections."""
        if not self.eta_sweep:
            etas, multipliers = ([], [1.0]) if self.single_eta is None else ([self.single_eta], [])
        else:
            etas, multipliers = ([], self.eta_multipliers) if self.eta_list is None else (self.eta_list, [])
        options: dict[str, Any] = {
            "etas": tuple(etas),
            "eta_multipliers": tuple(multipliers),
            "at_lr": False,
            "symmetric": self.symmetric,
            "normalize": self.normalize,
            "weighting": self.weighting,
            "integrand": "surprisal" if self.use_simple_entropy_for_x else "rao_blackwell",
            "baseline": self.baseline,
            "gae_lambda": self.gae_lambda,
            "clip_log_weight": self.clip_log_weight,
            "confidence": self.confidence,
            "method": self.method,
        }
        return EntropyProbe(**options, **others)


@dataclass(frozen=True)
class UpdateSettings:
    """What makes the U-batch's gradient, and the step, the ones that training would have taken.

    Args:
        loss_type: how tokens are weighted: `grpo`, `dr_grpo`, `dapo` or `bnpo`.
        advantage: `mean_std` (GRPO), `mean` (Dr. GRPO) or `leave_one_out` (RLOO).
        rewards: names of registered rewards.
        reward_weights: one per reward. None: 1 each.
        clip_low: the ratio π/π_old is clipped at 1 - clip_low.
        clip_high: and at 1 + clip_high. U is drawn at θ, where the ratio is 1: neither changes the step.
        kl_coefficient: weight of the KL divergence to the policy with its adapter off.
        entropy_coefficient: weight of the entropy bonus.
        advantage_sign: completions of which advantages the policy gradient is of: `both`, `positive` or `negative`.
        clip_cov_fraction: Clip-Cov: the share of tokens, drawn among those whose covariance of log-prob and advantage
            lies inside `clip_cov_bounds`, without a policy gradient. 0 switches it off.
        clip_cov_bounds: smallest and largest covariance, in nats.
        kl_cov_fraction: KL-Cov: the share of tokens with the largest covariance that pays for leaving the policy that
            sampled. 0 switches it off. At ratio 1 there is nothing to pay, and the step is the same.
        kl_cov_coefficient: their price, per nat of |log(π/π_old)|.
        zero_advantage: groups of equal rewards: `keep`, `filter` or `resample`.
        max_resamples: rounds of resampling.
        top_p: U is sampled from the smallest set of tokens with this probability.
        top_k: U is sampled from the k likeliest tokens. None keeps all.
        max_grad_norm: the gradient is scaled down to this norm. None leaves it.
        lr: η of the step. None takes the optimizer file's (with `after_checkpoint_path`, 1).
        decoupled_weight_decay: AdamW's (true) or Adam's L2 decay (false). None: as the file says, else AdamW's.
    """

    loss_type: LossType = "grpo"
    advantage: AdvantageKind = "mean_std"
    rewards: list[str] = field(default_factory=lambda: ["format", "numeric_answer"])
    reward_weights: list[float] | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    advantage_sign: AdvantageSign = "both"
    clip_cov_fraction: float = 0.0
    clip_cov_bounds: tuple[float, float] = (1.0, 5.0)
    kl_cov_fraction: float = 0.0
    kl_cov_coefficient: float = 1.0
    zero_advantage: ZeroAdvantage = "keep"
    max_resamples: int = 2
    top_p: float = 1.0
    top_k: int | None = None
    max_grad_norm: float | None = 1.0
    lr: float | None = None
    decoupled_weight_decay: bool | None = None

    def __post_init__(self) -> None:
        self.sampler()  # checks what it is given
        self.loss(max_new_tokens=1)
        for name in ("max_grad_norm", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"expected {name} above 0, or None, got {value}")

    def sampler(self, **others: Any) -> GroupSampler:
        """What draws the U-batch; ``others`` are its arguments from other sections."""
        return GroupSampler(
            RewardSum(self.rewards, self.reward_weights),
            top_p=self.top_p,
            top_k=self.top_k,
            zero_advantage=self.zero_advantage,
            max_resamples=self.max_resamples,
            **others,
        )

    def loss(self, max_new_tokens: int) -> LossSettings:
        """The loss; ``max_new_tokens`` is the constant that ``dr_grpo`` divides by."""
        return LossSettings(
            self.loss_type,
            self.clip_low,
            self.clip_high,
            self.kl_coefficient,
            max_completion_length=max_new_tokens,
            entropy_coefficient=self.entropy_coefficient,
            advantage_sign=self.advantage_sign,
            clip_cov_fraction=self.clip_cov_fraction,
            clip_cov_bounds=self.clip_cov_bounds,
            kl_cov_fraction=self.kl_cov_fraction,
            kl_cov_coefficient=self.kl_cov_coefficient,
        )


@dataclass(frozen=True)
class UpdateVectorPrecision:
    """How the U-batch's gradient is computed.

    Args:
        use_amp: run its forward pass under autocast, as mixed-precision training does.
        amp_dtype: of autocast.
        grads_fp32: hold parameters and gradient in float32 at least; false: in the parameters' own dtype.
    """

    use_amp: bool = False
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    grads_fp32: bool = True


@dataclass(frozen=True)
class PrecisionSettings:
    """Number formats.

    Args:
        allow_tf32: let float32 products use TF32 on CUDA, where `matmul_precision` is not `highest`; false wins.
        matmul_precision: `highest`, `high` or `medium`, as in `torch.set_float32_matmul_precision`.
        runtime_dtype: of the model's forward passes, `float32` or `float64`.
        entropy_dtype: of softmax, log-prob and entropy.
        update_vector: how the U-batch's gradient is computed.
    """

    allow_tf32: bool = False
    matmul_precision: MatmulPrecision = "highest"
    runtime_dtype: Precision = "float32"
    entropy_dtype: Precision = "float64"
    update_vector: UpdateVectorPrecision = field(default_factory=UpdateVectorPrecision)

    def __post_init__(self) -> None:
        if self.products != self.matmul_precision:
            warnings.warn(
                f"matmul_precision: {self.matmul_precision} would turn TF32 on, and allow_tf32: false forbids it: "
                "products are float32",
                stacklevel=2,
            )
        if self.runtime_dtype == "float64":
            if self.update_vector.use_amp or not self.update_vector.grads_fp32:
                raise ValueError(
                    "expected update_vector.use_amp: false and update_vector.grads_fp32: true with runtime_dtype: "
                    "float64, whose gradient is float64 throughout"
                )
            if self.entropy_dtype == "float32":
                raise ValueError("expected entropy_dtype: float64 with runtime_dtype: float64, got float32")

    @property
    def products(self) -> MatmulPrecision:
        """How float32 products are computed: as `matmul_precision` says, where `allow_tf32` lets it."""
        return self.matmul_precision if self.allow_tf32 else "highest"


@dataclass(frozen=True)
class MeasurementSettings:
    """One offline measurement.

    Args:
        checkpoint: what is measured.
        batch_config: the E- and the U-batch.
        generation: how completions are drawn.
        estimator: which entropy, at which step sizes, by which estimator.
        update: what makes the step the one training would have taken.
        precision: number formats.
        attribution: who moved the entropy, and what other losses would have done.
        detailed_logging: a log of everything that was measured, as far down as single tokens.
        seed: of prompts and completions.
        output_directory: where `results.json`, `config.yaml` and the figure go. None writes none.

    Raises:
        ValueError: for a negative seed, or sections that contradict each other.
    """

    checkpoint: CheckpointSettings
    batch_config: BatchSettings = field(default_factory=BatchSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    estimator: EstimatorSettings = field(default_factory=EstimatorSettings)
    update: UpdateSettings = field(default_factory=UpdateSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    attribution: AttributionSettings = field(default_factory=AttributionSettings)
    detailed_logging: LoggingSettings = field(default_factory=LoggingSettings)
    seed: int = 0
    output_directory: str | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"expected a seed of at least 0, got {self.seed}")
        if self.checkpoint.quantization is not None and self.precision.runtime_dtype == "float64":
            raise ValueError(
                f"expected no checkpoint.quantization with runtime_dtype: float64, got {self.checkpoint.quantization}: "
                "4-bit layers have no float64 arithmetic"
            )
        for name in self.attribution.counterfactuals:
            try:
                intervened(self.update.loss(self.generation.max_new_tokens), name)
            except ValueError as error:  # a name there is none of, or one that contradicts the update's own loss
                raise ValueError(f"attribution.counterfactuals, {name}: {error}") from error

    def probe(self) -> EntropyProbe:
        """The probe that all sections together mean."""
        return self.estimator.probe(
            temperature=self.generation.temperature,
            precision=self.precision.runtime_dtype,
            entropy_dtype=self.precision.entropy_dtype,
            max_batch_tokens=self.generation.max_batch_tokens,
            compile_statistics=self.generation.compile_statistics,
        )
