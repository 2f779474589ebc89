"""The offline instrument: a checkpoint with its optimizer, one config, as many measurements as one likes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from entropy_pl.config import SettingsParser
from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.measurements.batches import draw_e_batch, draw_u_batch, prompt_data, rewards_of_e
from entropy_pl.measurements.results import ResultsFolder, make_writable, sweep_with_seed_keys, versions
from entropy_pl.measurements.settings import MeasurementSettings
from entropy_pl.measurements.training import differences_from_training
from entropy_pl.measurements.update import MeasuredUpdate, counterfactual_of, update_from_optimizer, update_from_pair
from entropy_pl.policy import Checkpoint, checkpoint_weights, decode_completions, load_checkpoint
from entropy_pl.policy.precision import matmul_precision
from entropy_pl.probe import MeasuredStep, ProbeScores, SamplerGate, StepMeasurement, take_dry_run, timed
from entropy_pl.probe.step import noted
from entropy_pl.progress import progress
from entropy_pl.records import SCHEMA, Json
from entropy_pl.reporting import DetailedLog, MeasuredBatch, config_hash
from entropy_pl.reporting.attributing import measured_record
from entropy_pl.rollout import Rollout

OnPass = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is to be scored.

    Args:
        rollout: the E-batch, drawn at θ.
        prompts: of every sequence, ``[N]``.
        update: v, and how it was made.
        seconds: wall time per phase.
        answers: the reference answer of every sequence, ``[N]``; None where they are not known any more.
        sampler_gap: mean ``|log-prob as generated − as scored|`` of a few sequences, nats a token; None where E was not
            drawn here.
    """

    rollout: Rollout
    prompts: list[str]
    update: MeasuredUpdate
    seconds: dict[str, float]
    answers: list[str] | None = None
    sampler_gap: float | None = None


class EntropyMeasurements:
    """Measures, offline, what the next optimizer step of a checkpoint would do to the policy's entropy.

    The policy and its optimizer state are loaded; a U-batch is drawn, rewarded and turned into the gradient that
    training would have taken; the AdamW step follows from it and the saved moments; an E-batch of its own measures
    ΔH(η) along that step beside δH₁(η). Or v is the difference of two checkpoints.

    Args:
        config: a mapping, a YAML file's path, or settings at hand.

    Raises:
        ValueError: for an unknown key, a value of another type or an impossible one.
        FileNotFoundError: if there is no such config file.

    Example:
        results = EntropyMeasurements("configs/measure.yaml").run_experiments()
        for point in results["sweep"]:
            print(point["eta"], point["deltaH_true"], point["true"]["stderr"], point["deltaH_approx"])
    """

    def __init__(self, config: Mapping[str, Any] | str | os.PathLike[str] | MeasurementSettings) -> None:
        self.settings = (
            config if isinstance(config, MeasurementSettings) else SettingsParser(MeasurementSettings).read(config)
        )
        self._of_dry_run: list[str] | None = None  # what it found, in sentences
        self._gate = SamplerGate()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The policy and the raw optimizer state, loaded when first needed.

        Raises:
            ValueError: if the checkpoint, its optimizer or the base model cannot be used.
        """
        chosen = self.settings.checkpoint
        checkpoint = load_checkpoint(
            chosen.checkpoint_path,
            optimizer_path=chosen.optimizer_path,
            backbone=chosen.backbone,
            lora=chosen.lora,
            dtype=chosen.dtype,
            quantization=chosen.quantization,
            device_map=chosen.device_map,
            optimizer=chosen.after_checkpoint_path is None,
        )
        if checkpoint.optimizer is None and chosen.after_checkpoint_path is None:
            raise ValueError(
                f"expected an optimizer's state in or beside {chosen.checkpoint_path}, got none: give "
                "checkpoint.optimizer_path, or checkpoint.after_checkpoint_path for the difference of two checkpoints"
            )
        if chosen.device_map is None and torch.cuda.is_available():
            checkpoint.policy.model.to("cuda")  # type: ignore[arg-type]
        return checkpoint

    def run_experiments(self, *, progress_bar: bool = True) -> Json:
        """Measure, write what the config asks to be written, and return the results.

        Args:
            progress_bar: show one, with the time left; never without a terminal.

        Returns:
            A JSON-able dict: ``sweep``, one dict per η (``eta``, ``deltaH_true``, ``deltaH_approx`` in nats; ``true``
            and ``first_order``, the same with standard error, interval, ESS and weight health; ``reward_true`` and
            ``reward_first_order``, ΔJ(η) and η·δJ₁ of the expected reward J), ``entropy``, ``first_order`` (per unit
            η), ``second_order`` (per unit η²), ``eta_star``, ``symmetric``, ``power_law`` (log-log slope and R²),
            ``expected_reward`` and ``exchange_rate`` (ΔH/ΔJ at η = lr), ``attribution``,
            ``predictors`` and ``counterfactuals`` where they were asked for, ``absent`` (what was and is not there, and
            why), ``update`` and how it was made, ``B_E``, ``B_U``, ``G``, ``timing`` (seconds per phase, ``total``),
            ``sampler_gap`` (mean ``|log-prob as generated − as scored|`` of a few sequences, nats a token),
            ``tokens_per_second``, ``device``, ``versions``, ``config``, ``config_hash``, ``seed``.

        Raises:
            ValueError: if the output folder holds results of another config, the checkpoint cannot be used, a dry run
                of two completions fails, no estimate can be made, or sampler and scorer are two policies
                (``SamplerMismatchError``).
            NonFiniteError: if the policy's logits are not finite at a θ+ηv of the sweep: that step was too long.
            OSError: if the output folder or the log's cannot be written to.
        """
        settings = self.settings
        fingerprint = fingerprint_of(settings)
        folder = None if settings.output_directory is None else ResultsFolder(settings.output_directory, fingerprint)
        if settings.detailed_logging.enabled:
            make_writable(Path(settings.detailed_logging.output_directory))
        seconds: dict[str, float] = {}
        with (
            timed(seconds, "total"),
            progress("entropy measurement", self.passes, "pass", shown=progress_bar) as bar,
        ):

            def advance(phase: str) -> None:
                bar.set_postfix_str(phase, refresh=False)
                bar.update()

            drawn = self.draw(on_pass=advance)
            policy = self.checkpoint.policy
            measurement = StepMeasurement(policy.model, settings.probe(), settings.attribution, seconds=seconds)
            assert drawn.answers is not None
            rewards = None
            with timed(seconds, "rewards"), noted(measurement.absent, "reward"):
                rewards = rewards_of_e(policy, drawn.rollout, drawn.answers, settings)
            counterfactual = counterfactual_of(policy.model, drawn.update, settings, measurement.absent)
            with matmul_precision(settings.precision.products):
                measured = measurement.measure(
                    drawn.rollout,
                    drawn.update.vector,
                    rewards=rewards,
                    update_batch=drawn.update.batch,
                    counterfactual=counterfactual,
                    on_pass=advance,
                )
            vector, step = drawn.update.vector, drawn.update.facts.get("step", 0)
            found, tokens = measured_record(measured, measurement, policy.tokenizer, step=step, lr=vector.lr)
        results = self._results(drawn, measured, found, seconds | drawn.seconds, fingerprint)
        if folder is not None:
            folder.write(results, tokens)
        if settings.detailed_logging.enabled:
            self._log(drawn, measured, results)
        return results

    def draw(self, settings: MeasurementSettings | None = None, *, on_pass: OnPass = lambda phase: None) -> Drawn:
        """Draw both batches and make v.

        Args:
            settings: others for the same checkpoint (another seed, another B_E); None: this measurement's.
            on_pass: called with a phase's name after every pass, for progress bars.

        Raises:
            ValueError: as :meth:`run_experiments`.
        """
        settings = settings or self.settings
        seconds: dict[str, float] = {}
        with timed(seconds, "loading"):
            data = prompt_data(settings)  # first: a large policy takes minutes
            policy = self.checkpoint.policy
        on_pass("loading")
        with matmul_precision(settings.precision.products):
            if self._of_dry_run is None:
                of_a_pair = settings.checkpoint.after_checkpoint_path is not None
                self._of_dry_run = take_dry_run(
                    settings.probe(),
                    policy.model,
                    policy.tokenizer,
                    data.e_prompts,
                    max_new_tokens=settings.generation.max_new_tokens,
                    attribution=settings.attribution.enabled and not of_a_pair,
                )
            update = self._update(data, settings, seconds, on_pass)
            with timed(seconds, "sampling_e", policy.model):
                rollout = StepMeasurement(policy.model, settings.probe(), settings.attribution).draw(
                    self._gate, lambda generated: draw_e_batch(policy, data.e_prompts, settings, generated)
                )
            on_pass("sampling E")
        each = settings.batch_config.completions_per_prompt
        return Drawn(
            rollout,
            [prompt for prompt in data.e_prompts for _ in range(each)],
            update,
            seconds,
            [example.answer for example in data.e_examples for _ in range(each)],
            self._gate.gap,
        )

    def score(
        self,
        drawn: Drawn,
        settings: MeasurementSettings | None = None,
        *,
        on_pass: OnPass = lambda phase: None,
    ) -> ProbeScores:
        """Score an E-batch at θ, along v and at every θ+ηv.

        Args:
            drawn: what :meth:`draw` returned.
            settings: as there.
            on_pass: called with a phase's name after every pass.
        """
        settings = settings or self.settings
        with matmul_precision(settings.precision.products):
            return settings.probe().collect(
                self.checkpoint.policy.model,
                drawn.rollout,
                drawn.update.vector,
                on_pass=on_pass,
            )

    @property
    def draw_passes(self) -> int:
        """Passes of :meth:`draw`: loading, U's sampling (not of a pair), the update, E's sampling."""
        return 3 + (self.settings.checkpoint.after_checkpoint_path is None)

    @property
    def passes(self) -> int:
        """Passes of a measurement: :meth:`draw`'s, the probe's and, but for a few, attribution's."""
        of_a_pair = self.settings.checkpoint.after_checkpoint_path is not None
        attribution = 0 if of_a_pair else self.settings.attribution.passes
        return self.draw_passes + self.settings.probe().passes(lr=1.0) + attribution

    def _update(
        self, data: PromptDataModule, settings: MeasurementSettings, seconds: dict[str, float], on_pass: OnPass
    ) -> MeasuredUpdate:
        policy, after = self.checkpoint.policy, settings.checkpoint.after_checkpoint_path
        if after is not None:
            with timed(seconds, "update", policy.model):
                update = update_from_pair(policy.model, checkpoint_weights(after, policy.model), settings.update.lr)
        else:
            assert self.checkpoint.optimizer is not None
            with timed(seconds, "sampling_u", policy.model):
                groups = draw_u_batch(policy, data, settings)
            on_pass("sampling U")
            with timed(seconds, "update", policy.model):
                update = update_from_optimizer(policy.model, self.checkpoint.optimizer, groups, settings)
            self._compare_with_training(update, settings)
        on_pass("update")
        if update.vector.norm() == 0:
            why = "there is neither gradient nor momentum" if after is None else "the two checkpoints are the same"
            raise ValueError(f"expected an update that moves the policy, got v = 0: {why}")
        return update

    def _compare_with_training(self, update: MeasuredUpdate, settings: MeasurementSettings) -> None:
        """Say, and record, where the step rebuilt is not the one of the run."""
        differences = differences_from_training(settings, self.checkpoint.hyper_parameters)
        update.facts["differs_from_training"] = differences
        if differences:
            listed = ", ".join(f"{key} {both['here']} (run: {both['training']})" for key, both in differences.items())
            warnings.warn(
                f"the step is not the one this run would have taken: {listed}. Set them as the run had them, unless "
                "that is what you want to know",
                stacklevel=2,
            )

    def _results(
        self, drawn: Drawn, measured: MeasuredStep, found: Json, seconds: dict[str, float], fingerprint: str
    ) -> Json:
        settings, batch, result = self.settings, self.settings.batch_config, measured.result
        seconds = seconds | found.pop("seconds")
        scored_tokens = result.entropy.n_tokens * settings.probe().passes(result.lr)
        scoring = sum(time for phase, time in result.seconds.items() if phase != "counterfactuals")
        return {
            "schema": SCHEMA,
            "kind": "measurement",
            "status": "ok",
            "message": None,
            "step": drawn.update.facts.get("step"),
            "B_E": batch.B_E,
            "B_U": batch.B_U,
            "G": batch.G,
            "completions_per_prompt": batch.completions_per_prompt,
            **found,
            "warnings": [*(self._of_dry_run or ()), *found["warnings"]],
            "sampler_gap": drawn.sampler_gap,
            "sweep": sweep_with_seed_keys(found["sweep"]),
            "update": drawn.update.facts,
            "timing": seconds,
            "tokens_per_second": {
                "sampling": result.entropy.n_tokens / seconds["sampling_e"],
                "scoring": scored_tokens / scoring,
            },
            "seed": settings.seed,
            "device": str(next(self.checkpoint.policy.model.parameters()).device),
            "versions": versions(),
            "config_hash": fingerprint,
            "config": asdict(settings),
        }

    def _log(self, drawn: Drawn, measured: MeasuredStep, results: Json) -> None:
        scores, result = measured.scores, measured.result
        batch = MeasuredBatch(
            rollout=drawn.rollout,
            base=scores.base,
            tangent=scores.tangent,
            shifted=scores.shifted,
            changes={point.eta: point.true for point in result.sweep},
            first_order=result.first_order,
            clusters=scores.clusters,
            prompts=drawn.prompts,
            completions=decode_completions(self.checkpoint.policy.tokenizer, drawn.rollout),
        )
        run_id = f"{datetime.now():%Y%m%d-%H%M%S-%f}-{results['config_hash'][:8]}"
        with DetailedLog(self.settings.detailed_logging, run_id) as log:
            log.write_measurement(
                results, batch, config=_what_counts(self.settings), seconds=results["timing"]["total"]
            )


def fingerprint_of(settings: MeasurementSettings) -> str:
    """Hash of everything in the settings that may change a number: where and what is logged does not."""
    return config_hash(_what_counts(settings))


def _what_counts(settings: MeasurementSettings) -> dict[str, Any]:
    return {
        name: section
        for name, section in asdict(settings).items()
        if name not in ("detailed_logging", "output_directory")
    }
