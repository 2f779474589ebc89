"""What is broken on purpose, one line of the product at a time, and where the tests lie that have to see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One mistake that somebody could make.

    Args:
        file: of the product, from the repository's root.
        old: text that stands in it exactly once.
        new: what stands there instead.
        what: the mistake, in words.
        tests: files or folders, in the order in which they are run.
    """

    file: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...]


# File → (the exact old text, the new one, what the mistake is).
CHANGES: dict[str, list[tuple[str, str, str]]] = {
    # ------------------------------------------------------------------------------------------------- estimators
    "entropy_pl/estimators/snis.py": [
        (
            'integrand = count if self.integrand == "rao_blackwell" else including',
            "integrand = including",
            "weight of h_ik runs over j ≤ k instead of j < k",
        ),
        (
            'integrand = count if self.integrand == "rao_blackwell" else including',
            "integrand = count",
            "weight of a surprisal runs over j < k instead of j ≤ k",
        ),
        (
            "count = torch.cat([torch.zeros_like(including[:, :1]), including[:, :-1]], dim=1)",
            "count = including",
            "weight of m_ik runs over j ≤ k instead of j < k",
        ),
        (
            "integrand = count = including[:, -1:].expand_as(log_ratio)",
            "integrand = count = including",
            "`sequence` weights stop at k",
        ),
        (
            "self.log_weights(torch.where(mask, logp - base_logp, 0.0))",
            "self.log_weights(logp - base_logp)",
            "log ratios: mask dropped",
        ),
        ("torch.where(mask, integrand, 0.0))", "integrand)", "integrand: mask dropped"),
        (
            "torch.where(mask, logp - base_logp, 0.0))",
            "torch.where(mask, base_logp - logp, 0.0))",
            "log ratio: base and shifted swapped",
        ),
        (
            'entropy if self.integrand == "rao_blackwell" else -logp',
            'entropy if self.integrand == "rao_blackwell" else logp',
            "surprisal: sign flipped",
        ),
        ("weight = weight / weight.mean(0)", "weight = weight / 1.0", "weights are not self-normalized"),
        (
            "(weight * (x - mean)).sum(1)",
            "(weight * x - mean).sum(1)",
            "influence: the noise of the weights' mean forgotten",
        ),
        (
            "(total_influence - value * length_influence) / length",
            "total_influence / length",
            "influence: the quotient rule forgets the mean length",
        ),
        (
            "length, length_influence = _self_normalized_total(log_weight_count, mask.to(total.dtype))",
            "length, length_influence = _self_normalized_total(0 * log_weight_count, mask.to(total.dtype))",
            "the mean length is not reweighted",
        ),
        ("influence - base_influence,", "influence,", "ΔH's influence: the base's own not subtracted"),
        ("value - base_value,", "base_value - value,", "ΔH: base and shifted swapped"),
        (
            "value, influence = measure.reduce(s0, s1, h1, mask)",
            "value, influence = measure.reduce(s0, s1, h0, mask)",
            "ΔH: entropies of θ under the weights of θ+ηv",
        ),
        (
            "ess = weight.sum(0).square() / weight.square().sum(0)",
            "ess = weight.sum(0) / weight.square().sum(0)",
            "ESS: a square forgotten",
        ),
        (
            'float(ess.min() if measure.weighting == "prefix" else ess[-1])',
            "float(ess[-1])",
            "ESS: its minimum not taken",
        ),
        (
            "integrand.clamp(-bound, bound), count.clamp(-bound, bound)",
            "integrand.clamp(max=bound), count.clamp(max=bound)",
            "weights clipped on one side only",
        ),
        ("(magnitude > bound)", "(magnitude < bound)", "clipped fraction: sign flipped"),
        (
            "of_sequences = cumulative[:, -1].exp()",
            "of_sequences = cumulative[:, 0].exp()",
            "mean weight: of the first token alone",
        ),
        (
            "standard_error(of_sequences - mean, clusters)",
            "standard_error(of_sequences - mean)",
            "mean weight's error: no clustering",
        ),
    ],
    "entropy_pl/estimators/derivatives.py": [
        ("half_square = eta * eta / 2", "half_square = eta * eta", "second order: ½ forgotten"),
        (
            "value - gain.mean(), influence - (gain - gain.mean())",
            "value + gain.mean(), influence + (gain - gain.mean())",
            "baseline: sign flipped",
        ),
        (
            "value - gain.mean(), influence - (gain - gain.mean())",
            "value - gain.mean(), influence",
            "baseline: in the value and not in the influences",
        ),
        (
            ").mean(0)  # over all N, ended ones counted as zero",
            ").sum(0) / mask.sum(0).clamp(min=1)",
            "the batch mean that a baseline replaces: over those alive at k instead of all N",
        ),
        (
            "to_go = _from_here_on(x) - x if rao_blackwell else _from_here_on(x)",
            "to_go = _from_here_on(x)",
            "entropy-to-go starts at k instead of k+1",
        ),
        (
            "centre * (_from_here_on(mask) - mask)",
            "centre * _from_here_on(mask)",
            "tokens to go start at k instead of k+1",
        ),
        (
            "sdot = torch.where(base.mask, tangent.logp.double(), 0.0)",
            "sdot = tangent.logp.double()",
            "baseline: mask dropped",
        ),
        (
            'x.sum() / mask.sum() if measure.normalize == "per_token"',
            'x.mean() if measure.normalize == "per_token"',
            "ĥ: a mean over padding as well",
        ),
        (
            'length = mask.sum(1).mean() if measure.normalize == "per_token" else mask.new_ones(())\n    sdot',
            "length = mask.new_ones(())\n    sdot",
            "baseline: not divided by T̄",
        ),
        (
            "return jvp(path, (eta,), (torch.ones_like(eta),))[1]",
            "return jvp(path, (eta,), (-torch.ones_like(eta),))[1]",
            "derivative: sign flipped",
        ),
    ],
    "entropy_pl/estimators/critic.py": [
        (
            "total, alive = total.sum(0) - total, alive.sum(0) - alive",
            "total, alive = total.sum(0).expand_as(total), alive.sum(0).expand_as(alive)",
            "position means see the fold they serve",
        ),
        (
            'fitted - base.mask.to(fitted) if fitted is not None and integrand == "surprisal" else fitted',
            "fitted",
            "surprisal: the baseline's −1 forgotten",
        ),
        ("values + (1 - gae_lambda) * later", "values - (1 - gae_lambda) * later", "gae: sign flipped"),
        (
            "ahead = error[:, k + 1] + gae_lambda * ahead",
            "ahead = error[:, k] + gae_lambda * ahead",
            "gae: shifted by a position",
        ),
        ("entropy, entropy.cumsum(1) - entropy)", "entropy, entropy.cumsum(1))", "the past includes token k"),
        (
            "return index % folds, folds",
            "return torch.arange(count) % folds, folds",
            "folds split a prompt's completions",
        ),
        (
            "return values + (returns - to_go)",
            "return values",
            "critic under `sequence`: the past that is known left out",
        ),
    ],
    "entropy_pl/estimators/ridge.py": [
        (
            "gone = frozenset() if left_out is None else frozenset({left_out})",
            "gone: frozenset[int] = frozenset()",
            "a fold is predicted by a fit that saw it",
        ),
        (
            "float(line[0] - self._shift @ beta)",
            "float(line[0] + self._shift @ beta)",
            "intercept: sign flipped",
        ),
        ("path = self._path(gone | {f})", "path = self._path(gone)", "the penalty is chosen on what was fitted"),
        ("beta = scale[:, None] * (vectors @ shrunk)", "beta = vectors @ shrunk", "coefficients left in scaled units"),
    ],
    "entropy_pl/estimators/differences.py": [
        (
            "[(1.0, true), (-eta, matched), (eta, low)]",
            "[(1.0, true), (eta, matched), (-eta, low)]",
            "the exchange of first orders: signs flipped",
        ),
        (
            "[(1.0, true), (-eta, matched), (eta, low)]",
            "[(1.0, true), (-1.0, matched), (1.0, low)]",
            "the exchange of first orders: η forgotten",
        ),
        ("(-0.5 / eta, minus)", "(0.5 / eta, minus)", "odd part: sign flipped"),
        (
            "odd = [(0.5 / eta, plus), (-0.5 / eta, minus)]",
            "odd = [(1 / eta, plus), (-1 / eta, minus)]",
            "odd part: ½ forgotten",
        ),
        ("(1 / eta**2, minus)", "(-1 / eta**2, minus)", "even part: sign flipped"),
    ],
    "entropy_pl/estimators/estimate.py": [
        ("return count / (count - 1) * (sums @ sums.T)", "return (sums @ sums.T)", "variance over N instead of N − 1"),
        (
            "index = cluster_index(clusters, psi.shape[1])",
            "index = np.arange(psi.shape[1])",
            "no clustering by prompt",
        ),
        (
            "stats.t.ppf(0.5 + confidence / 2, count - 1)",
            "stats.t.ppf(confidence, count - 1)",
            "interval: one-sided quantile",
        ),
        (
            "stats.t.ppf(0.5 + confidence / 2, count - 1)",
            "stats.norm.ppf(0.5 + confidence / 2)",
            "interval: normal instead of Student's t",
        ),
        ("stderr=self.stderr * abs(factor)", "stderr=self.stderr * factor", "scaled: a negative standard error"),
        (
            "torch.stack([factor * estimate.influence for",
            "torch.stack([abs(factor) * estimate.influence for",
            "combination: noise that cancels adds up",
        ),
        ("ess=min(estimate.ess for", "ess=max(estimate.ess for", "combination: the best ESS instead of the worst"),
        (
            "interval(self.value, stderr, self.n_clusters, self.confidence)",
            "interval(self.value, self.stderr, self.n_clusters, self.confidence)",
            "another standard error leaves the interval",
        ),
        (
            "max(MEAN_WEIGHT_ERRORS * self.mean_weight_stderr, MEAN_WEIGHT_TOLERANCE)",
            "MEAN_WEIGHT_TOLERANCE",
            "mean weight: its own error forgotten",
        ),
        (
            "self.n_sequences >= FEWEST_SEQUENCES and self.n_clusters >= FEWEST_CLUSTERS",
            "self.n_sequences >= FEWEST_SEQUENCES",
            "few prompts are believed",
        ),
    ],
    "entropy_pl/estimators/ratio.py": [
        ("value = a / b if b else math.nan", "value = b / a if b else math.nan", "numerator and denominator swapped"),
        (
            "(numerator - value * denominator).stderr",
            "(numerator + value * denominator).stderr",
            "delta method: sign of the covariance flipped",
        ),
        ("a * b - t_square * float(v[0, 1])", "a * b", "Fieller: the covariance forgotten"),
        (
            "student_t(numerator.confidence, count) ** 2",
            "student_t(numerator.confidence, count)",
            "Fieller: t instead of t²",
        ),
        (
            "return FiellerSet((middle + reach) / square, (middle - reach) / square, outside=True)",
            "return FiellerSet((middle + reach) / square, (middle - reach) / square)",
            "Fieller: a denominator not told from zero gives the interval that it excludes",
        ),
        ("0.0 if 0.0 in self else min(ends)", "min(ends)", "η*: a set that holds zero has a lower end above it"),
        ("(2 * end for end in", "(end for end in", "η*'s interval: 2 forgotten"),
        ("value = 2 * abs(first.value / second.value)", "value = abs(first.value / second.value)", "η*: 2 forgotten"),
    ],
    "entropy_pl/estimators/reward.py": [
        ("mask[:, 0] = True", "mask[:, 0] = mask[:, 0]", "an empty completion's reward is not counted"),
        (
            'weighting="sequence",\n        clip_log_weight=clip_log_weight,',
            'weighting="prefix",\n        clip_log_weight=clip_log_weight,',
            "ΔJ: weights of the prefix, before any token is drawn",
        ),
        (
            "_with_integrand(tangent, torch.zeros_like(integrand))",
            "_with_integrand(tangent, integrand)",
            "δJ₁: a reward that moves with θ",
        ),
        ("[:, None] * base.mask\n", "[:, None] * ~base.mask\n", "a reward's return: mask turned around"),
    ],
    "entropy_pl/estimators/jackknife.py": [
        ("np.flatnonzero(group != j)", "np.flatnonzero(group == j)", "the group is kept and the others left out"),
        ("(np.square(pseudo - centre) / (h - 1))", "(np.square(pseudo - centre) / h)", "g instead of g − 1"),
        ("group = index % g", "group = np.arange(count) % g", "groups split a prompt's completions"),
    ],
    "entropy_pl/estimators/fits.py": [
        (
            "eta, change = eta[np.sign(change) == sign], change[np.sign(change) == sign]",
            "eta, change = eta[change != 0], change[change != 0]",
            "power law: points of the other sign stay",
        ),
        ("change / eta * root", "change * root", "slope of ΔH/η: not divided by η"),
        ("np.stack([np.ones(len(eta)), eta / eta.max()], 1)", "np.ones((len(eta), 1))", "slope: curvature left out"),
        ("np.sqrt(weight[kept])", "weight[kept]", "slope: weights squared"),
    ],
    "entropy_pl/estimators/predictors.py": [
        ("prediction = -(s - s[mask].mean())", "prediction = (s - s[mask].mean())", "Cui et al.: sign flipped"),
        ("(a - a[mask].mean())", "(a - a.mean())", "Cui et al.: a mean over padding as well"),
        ("torch.expm1(s) * (s + entropy", "torch.expm1(s) * (s - entropy", "STEER: sign of H flipped"),
        (
            "ratio = torch.ones_like(s) if old_logp is None else (s - old_logp.detach().double()).exp()",
            "ratio = torch.ones_like(s)",
            "STEER: π_old forgotten",
        ),
        (
            "student_t(confidence, max(2, min(groups, n_clusters)))",
            "student_t(confidence, len(mask))",
            "agreement: degrees of freedom of sequences instead of groups",
        ),
        (
            "over, len(mask), clusters=clusters, groups=groups",
            "over, len(mask), groups=groups",
            "agreement: no clustering by prompt",
        ),
    ],
    # ---------------------------------------------------------------------------------------------------- policy
    "entropy_pl/policy/head.py": [
        (
            "columns = rollout.prompt_lengths[rows] + columns - 1",
            "columns = rollout.prompt_lengths[rows] + columns",
            "a token is predicted by its own position",
        ),
        (
            "rows, columns = rollout.completion_mask.nonzero(as_tuple=True)",
            "rows, columns = torch.ones_like(rollout.completion_mask).nonzero(as_tuple=True)",
            "completions: mask dropped",
        ),
        ("order = (~mask).int()", "order = mask.int()", "padding is packed in front"),
    ],
    "entropy_pl/policy/logits.py": [
        ("z = z / temperature", "z = z * temperature", "temperature turned around"),
        ("return target - log_total,", "return target + log_total,", "log-prob: sign flipped"),
        (
            "log_total - (exponential * z).sum(-1) / total",
            "log_total + (exponential * z).sum(-1) / total",
            "entropy: sign flipped",
        ),
        ("gradient.div_(temperature)", "gradient", "gradient by the logits: temperature forgotten"),
        ("addcmul_(p, a_chunk).neg_()", "addcmul_(p, a_chunk)", "gradient by the logits: sign flipped"),
    ],
    "entropy_pl/policy/score.py": [
        (
            "targets = rollout.completion_ids[rollout.completion_mask]",
            "targets = rollout.completion_ids.roll(1, 1)[rollout.completion_mask]",
            "targets shifted by a position",
        ),
        (
            "place = (mask.flatten().cumsum(0) - 1)",
            "place = mask.flatten().cumsum(0).clamp(max=int(mask.sum()) - 1)",
            "head inputs shifted by a token",
        ),
    ],
    "entropy_pl/policy/tangents.py": [
        (
            "return TokenStats((plus.logp - minus.logp) / (2 * step)",
            "return TokenStats((plus.logp - minus.logp) / step",
            "central difference: ½ forgotten",
        ),
        (
            "(plus.logp - 2 * base.logp + minus.logp) / step**2",
            "(plus.logp - 2 * base.logp + minus.logp) / (2 * step**2)",
            "second difference: ½ too many",
        ),
        (
            "_central_difference(base, stats(step), stats(-step), step)",
            "_central_difference(base, stats(-step), stats(step), step)",
            "central difference: plus and minus swapped",
        ),
        (
            "TokenStats((moved.logp - base.logp) / step",
            "TokenStats((base.logp - moved.logp) / step",
            "one-sided difference: base and shifted swapped",
        ),
    ],
    "entropy_pl/policy/sample.py": [
        (
            "is_end.cumsum(1) - is_end.long() == 0",
            "is_end.cumsum(1) == 0",
            "the first EOS does not count",
        ),
        (
            "is_end.cumsum(1) - is_end.long() == 0",
            "torch.ones_like(is_end)",
            "what follows the first EOS counts",
        ),
        (
            "prompt_mask[index, prompt_width - ids.shape[1] :] = mask",
            "prompt_mask[index, : ids.shape[1]] = mask",
            "prompts' mask shifted where prompts differ in length",
        ),
    ],
    # --------------------------------------------------------------------------------------------------- updates
    "entropy_pl/updates/displace.py": [
        (
            "parameters[name].data = alias.of(parameters[alias.owner].data)",
            "pass",
            "shared memory: one of two parameters stays behind",
        ),
        ("theta.double() + eta *", "theta.double() - eta *", "θ − ηv instead of θ + ηv"),
    ],
    "entropy_pl/updates/change.py": [
        (
            "after.double() - self.before[name].double()",
            "self.before[name].double() - after.double()",
            "Δθ: before and after swapped",
        ),
        ("change / self.lr", "change", "v is not per unit learning rate"),
        (
            "theta = theta.double() + lr * sum(parts)",
            "theta = theta.double()",
            "a parameter that two optimizers step: the second one's weight decay at the first one's θ",
        ),
    ],
    "entropy_pl/updates/record.py": [
        (
            "lr = max(step.lr for step in steps)",
            "lr = min(step.lr for step in steps)",
            "lr_ref: the smallest of several optimizers' rates",
        ),
    ],
    "entropy_pl/updates/vector.py": [
        ("return math.sqrt(self.dot(self))", "return self.dot(self)", "norm: no square root"),
        ("unexplained = value - sum(", "unexplained = value + sum(", "gap: sign flipped"),
        (
            "sums[part].append(_dot(value, gradient[name].to(value.device)))",
            "sums[part].append(-_dot(value, gradient[name].to(value.device)))",
            "along a component: sign flipped",
        ),
    ],
    "entropy_pl/updates/adamw.py": [
        (
            "gradient, scale=settings.lr / lr_ref)",
            "gradient, scale=1.0)",
            "components: lr_g/lr_ref forgotten",
        ),
        (
            "kept.get(name), scale=settings.lr / lr_ref)",
            "kept.get(name), scale=1.0)",
            "a step not taken: lr_g/lr_ref forgotten",
        ),
        ("(second.double() / (1 - beta2**step))", "second.double()", "second moment: bias correction forgotten"),
        ("denominator.mul_(1 - beta1**step)", "denominator", "first moment: bias correction forgotten"),
        ("decay.mul_(-scale)", "decay.mul_(scale)", "decoupled decay: sign flipped"),
        ("momentum.mul_(preconditioner).neg_()", "momentum.mul_(preconditioner)", "momentum: sign flipped"),
        (
            "momentum -= settings.seen(gradient, theta)",
            "momentum -= gradient",
            "momentum: L2 decay and `maximize` forgotten",
        ),
        ("(gradient * preconditioner).neg_()", "gradient * preconditioner", "gradient component: sign flipped"),
        ("(1 - beta2) * seen.square()", "(1 - beta2) * seen.abs()", "second moment: no square"),
        ("largest = torch.maximum(", "largest = torch.minimum(", "amsgrad: the smallest second moment"),
    ],
    "entropy_pl/updates/sgd.py": [
        (
            "return self.sign * gradient + self.weight_decay * theta",
            "return gradient + self.weight_decay * theta",
            "`maximize` forgotten",
        ),
    ],
    # ----------------------------------------------------------------------------------------------------- probe
    "entropy_pl/probe/engine.py": [
        (
            "shifted[eta] = token_stats(model, rollout, update=update, eta=eta, **self.scoring)",
            "shifted[eta] = token_stats(model, rollout, update=update, eta=-eta, **self.scoring)",
            "the sweep goes the other way",
        ),
    ],
    "entropy_pl/probe/reduction.py": [
        (
            "snis_delta_entropy(scores.base, shifted, clip",
            "snis_delta_entropy(shifted, scores.base, clip",
            "base and shifted swapped",
        ),
        (
            "snis_delta_reward(scores.base, shifted, rewards",
            "snis_delta_reward(shifted, scores.base, rewards",
            "rewards: base and shifted swapped",
        ),
        (
            "_less_certain(change, eta**2 * self.variance)",
            "_less_certain(change, self.variance)",
            "critic's noise: η² forgotten",
        ),
        (
            '{"clusters": scores.clusters, "confidence": settings.confidence}',
            '{"clusters": None, "confidence": settings.confidence}',
            "no clustering by prompt",
        ),
        (
            '{"clusters": scores.clusters, "confidence": settings.confidence}',
            '{"clusters": scores.clusters, "confidence": 0.95}',
            "the confidence asked for is ignored",
        ),
        ("first_order=eta * entropy.first,", "first_order=entropy.first,", "δH₁: η forgotten"),
        (
            "change - quantity.plain(taken)",
            "quantity.plain(taken) - change",
            "counterfactual difference: sign flipped",
        ),
        (
            "variance(anew=True) - variance(anew=False)",
            "variance(anew=False) - variance(anew=True)",
            "gae: the critic's noise with its sign flipped",
        ),
    ],
    "entropy_pl/probe/scores.py": [
        (
            "None if self.clusters is None else self.clusters[rows]",
            "None if self.clusters is None else self.clusters[: len(rows)]",
            "some sequences' scores with others' prompts",
        ),
        (
            "place = (self.rows.cumsum(0) - 1)[rows][kept]",
            "place = torch.arange(int(kept.sum()))",
            "some sequences' checked derivatives taken for others'",
        ),
    ],
    "entropy_pl/probe/smoothness.py": [
        ("if roughness > ROUGH:", "if roughness > 1e9:", "a policy that is not smooth passes for one that is"),
        (
            "slope(differences.select(rows)), slope(halved.first)",
            "slope(differences.select(rows)), slope(differences.select(rows))",
            "derivatives compared with themselves",
        ),
        (
            "if abs(exact.value - measured.value) <= AUTOGRAD_GAP",
            "if 0 * abs(exact.value - measured.value) <= AUTOGRAD_GAP",
            "forward mode is believed where it does not follow the forward pass",
        ),
        (
            "if gap > max(AUTOGRAD_GAP * max(abs(slope.value), slope.stderr), of_differences):",
            "if gap > 1e9:",
            "an attribution by a gradient that is not the forward pass's",
        ),
    ],
    "entropy_pl/probe/result_warnings.py": [
        ("limit = math.sqrt(-math.log(TRUSTED_ESS)) / spread", "limit = spread", "the step size advised: upside down"),
    ],
    # ----------------------------------------------------------------------------------------------- attribution
    "entropy_pl/attribution/influence.py": [
        (
            "per_token = -gradient_scale * token_coefficients",
            "per_token = gradient_scale * token_coefficients",
            "tokens: sign flipped",
        ),
        (
            "per_token = -gradient_scale * token_coefficients",
            "per_token = -token_coefficients",
            "tokens: clipping by norm forgotten",
        ),
        ("{name: p * gradient[name].to(p) for", "{name: gradient[name].to(p) for", "preconditioner forgotten"),
        (
            "own_entropy_term = -gradient_scale * float(gained)",
            "own_entropy_term = gradient_scale * float(gained)",
            "entropy term: sign flipped",
        ),
        (
            'parts["gradient"] - values["tokens"] - entropy_term',
            'parts["gradient"] - values["tokens"]',
            "remainder: entropy term forgotten",
        ),
        (
            "logp + factor * part.logp, entropy + factor * part.entropy",
            "logp - factor * part.logp, entropy - factor * part.entropy",
            "error bar of the gradient: sign flipped",
        ),
        ("-scale * preconditioner[name]", "scale * preconditioner[name]", "remainder's tangents: sign flipped"),
    ],
    "entropy_pl/updates/watched.py": [
        (
            "return max(\n            _rate(group)",
            "return min(\n            _rate(group)",
            "lr_ref: the smallest rate of an optimizer's groups",
        ),
    ],
    "entropy_pl/attribution/errors.py": [
        (
            "count * (values - total * sizes / whole)",
            "count * values",
            "over U: the other prompts' larger share forgotten",
        ),
        ("- total * sizes / whole", "- total / count", "over U: prompts of unequal size taken for equal"),
        ("standard_error(whole.influence, clusters)", "standard_error(whole.influence)", "over E: no clustering"),
        (
            'mask.sum(1).double() if divided_by == "tokens"',
            'mask.sum(1).double() if divided_by != "tokens"',
            "divisors swapped",
        ),
    ],
    "entropy_pl/attribution/matrix.py": [
        (
            "influence - relative[:, None] * values.mean(0) - own[:, None] * others[0] / lengths.mean()",
            "influence - own[:, None] * others[0] / lengths.mean()",
            "influence: the mean length's noise forgotten",
        ),
        (
            "influence - relative[:, None] * values.mean(0) - own[:, None] * others[0] / lengths.mean()",
            "influence - relative[:, None] * values.mean(0)",
            "influence: ĥ's noise forgotten",
        ),
        ("standard_error(column, clusters)[0]", "standard_error(column)[0]", "no clustering by prompt"),
        (
            "-gradient_scale * kernel, -gradient_scale * others",
            "gradient_scale * kernel, -gradient_scale * others",
            "matrix: sign flipped",
        ),
    ],
    "entropy_pl/attribution/blocks.py": [
        ("(blocks / (blocks - 1) * variance)", "(variance / blocks)", "B/(B−1) forgotten"),
        ("psi = part - n / count * whole", "psi = part", "blocks' parts not centred"),
        ("influence / tokens * longer", "influence / tokens * 0 * longer", "ĥ's noise forgotten"),
    ],
    # ------------------------------------------------------------------------------------------------ objectives
    "entropy_pl/objectives/advantages.py": [
        ("groups - groups.mean(1, keepdim=True)", "groups.mean(1, keepdim=True) - groups", "sign flipped"),
        ("groups.std(1, keepdim=True)", "groups.std(1, correction=0, keepdim=True)", "σ over G instead of G − 1"),
        ("(group_size / (group_size - 1))", "((group_size - 1) / group_size)", "leave-one-out: factor turned around"),
    ],
    "entropy_pl/objectives/losses.py": [
        ("token_loss = -torch.minimum(", "token_loss = -torch.maximum(", "clipping: minimum and maximum swapped"),
        ("token_loss = -torch.minimum(", "token_loss = torch.minimum(", "policy gradient: sign flipped"),
        ("ref_ratio.exp() - ref_ratio - 1", "ref_ratio.exp() + ref_ratio - 1", "KL: sign flipped"),
        (
            "torch.where(mask, ref_logp.detach() - logp, 0.0)",
            "torch.where(mask, logp - ref_logp.detach(), 0.0)",
            "KL: policy and reference swapped",
        ),
        (
            "token_loss - settings.entropy_coefficient *",
            "token_loss + settings.entropy_coefficient *",
            "entropy bonus: sign flipped",
        ),
        ("mask = weights > 0", "mask = torch.ones_like(weights, dtype=torch.bool)", "tokens: mask dropped"),
        (
            "counted / (whole.completions * counted.sum(1, keepdim=True).clamp(min=1))",
            "counted / (whole.completions * counted.shape[1])",
            "grpo: divided by the width instead of T_i",
        ),
        (
            "1 - settings.clip_low, 1 + settings.clip_high",
            "1 - settings.clip_high, 1 + settings.clip_low",
            "clip bounds swapped",
        ),
    ],
    "entropy_pl/objectives/covariance.py": [
        ("(spread - advantage_sum / tokens), 0.0)", "spread, 0.0)", "advantages not centred"),
        (
            "if int(total((ranks >= middle).sum())) >= count:",
            "if int(total((ranks >= middle).sum())) > count:",
            "one token too many",
        ),
        (
            "mask & (covariance > low) & (covariance < high)",
            "(covariance > low) & (covariance < high)",
            "Clip-Cov: mask dropped",
        ),
    ],
    # ------------------------------------------------------------------------------- when not to believe it
    "entropy_pl/monitor/rendering.py": [
        (
            "self.tokenizer(rendered, add_special_tokens=False)",
            "self.tokenizer(rendered)",
            "chats get the tokenizer's special tokens as well",
        ),
    ],
    "entropy_pl/monitor/trl_prompts.py": [
        (
            "Prompt(prompt.text, ids[place])",
            "Prompt(prompt.text, prompt.ids)",
            "E prompts without the trainer's own tokens",
        ),
    ],
    "entropy_pl/policy/vocabulary.py": [
        (
            "spare > max(PADDING, SPARE * embeddings)",
            "spare > PADDING",
            "padded vocabularies are taken for foreign ones",
        ),
        ("ends & (special | {own})", "own in ends", "a second EOS is taken for a foreign tokenizer's"),
    ],
    "entropy_pl/policy/wrapper.py": [
        (
            "return [None if start is None else length - start for start in starts]",
            "return [None if start is None else length - start - 1 for start in starts]",
            "activated LoRA: offset by one",
        ),
        (
            "None if start is None else start - pad",
            "None if start is None else start",
            "activated LoRA: padding counted in the offset",
        ),
    ],
    "entropy_pl/policy/positions.py": [
        (
            "(prompts <= boundary) & (prompts + rollout.completion_lengths > boundary)",
            "(prompts <= boundary) & (prompts + rollout.completion_lengths >= boundary)",
            "a sequence up to the boundary is taken to cross it",
        ),
    ],
    "entropy_pl/policy/generated.py": [
        (
            "ids.shape[1] - 1 - self._prompt_width",
            "ids.shape[1] - self._prompt_width",
            "log-probs as generated: off by one position",
        ),
        (
            ".double() / self._temperature",
            ".double() * self._temperature",
            "log-probs as generated: temperature the wrong way",
        ),
    ],
    "entropy_pl/probe/sampler_gate.py": [
        (
            "if self.mean > self.allowed:",
            "if self.mean > 10**6 * self.allowed:",
            "a sampler that is another policy passes",
        ),
    ],
    "entropy_pl/policy/measured_adapter.py": [
        (
            "if id(parameter) in other and id(parameter) not in acting:",
            "if False:",
            "the update holds other adapters too",
        ),
    ],
    "entropy_pl/updates/check.py": [
        ("if beyond > allowed:", "if beyond > 1e9 * allowed:", "a split that does not add up is offered"),
        (".sub_(rounding).clamp_(min=0)", "", "the rounding of θ counts against the split"),
    ],
    "entropy_pl/policy/gradients.py": [
        (
            "total[others[name].owner] += others[name].onto_owner(gradient)",
            "pass",
            "shared memory: one of two gradients is lost",
        ),
    ],
    "entropy_pl/policy/kernels.py": [
        ("grouped = dtype is not torch.float64 and (", "grouped = (", "experts by grouped products in float64"),
    ],
    "entropy_pl/policy/set_aside.py": [
        ("            module.train()", "            pass", "what layers kept of θ is read at another θ"),
        ('"output_router_logits": False', '"output_router_logits": True', "the routers' logits are asked for"),
    ],
    "entropy_pl/policy/duals.py": [
        ("slots[name] = parameter", "pass", "forward mode: a shared parameter stays a dual number"),
    ],
    "entropy_pl/policy/micro_batches.py": [
        (
            "(longest > boundary) == (lengths[i] > boundary)",
            "(longest > boundary) != (lengths[i] > boundary)",
            "two position regimes are scored together",
        ),
    ],
    "entropy_pl/probe/dry_run.py": [
        ("if seen > SEEN_BACKWARDS", "if seen < 0", "dry run: a policy that reads later tokens passes"),
    ],
    "entropy_pl/attribution/parts.py": [
        (
            "first_order.value - self.first_order",
            "self.first_order - first_order.value",
            "remainder `differences`: sign flipped",
        ),
    ],
    "entropy_pl/records/older.py": [
        ("_known(eta * _number(part, key))", "_known(_number(part, key))", "older records: still per unit η"),
    ],
    "entropy_pl/updates/left_out.py": [
        ("whole = math.hypot(change, taken_in)", "whole = taken_in", "what is left out: its share of the rest alone"),
    ],
    # ----------------------------------------------------------------------------------------------- what travels
    "entropy_pl/rollout.py": [
        (
            "ids = rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)",
            "ids = rollout.prompt_ids",
            "prompts told apart by their padding",
        ),
        (
            "[(some, 0) if pad_left else (0, some) for some in missing]",
            "[(0, some) for some in missing]",
            "prompts padded on the right",
        ),
        ("return self.completion_mask.sum(1)", "return self.completion_mask.sum(1) - 1", "lengths without the EOS"),
        ("temperature=temperatures.pop())", "temperature=1.0)", "batches put together forget their temperature"),
    ],
    "entropy_pl/monitor/step_monitor.py": [
        ("step % self.every_n_steps == 0", "(step + 1) % self.every_n_steps == 0", "probed steps counted from 1"),
    ],
}

ESTIMATORS, ATTRIBUTION, UPDATES = "tests/estimators", "tests/attribution", "tests/updates"
OBJECTIVES = "tests/objectives"

# The tests of its package, those first that are nearest to the file.
TESTS: dict[str, tuple[str, ...]] = {
    "entropy_pl/estimators/snis.py": (
        f"{ESTIMATORS}/test_closed_forms.py",
        "tests/faults/test_untrusted.py",
        ESTIMATORS,
    ),
    "entropy_pl/estimators/derivatives.py": (f"{ESTIMATORS}/test_closed_forms.py", ESTIMATORS),
    "entropy_pl/estimators/critic.py": (f"{ESTIMATORS}/test_critic.py", ESTIMATORS),
    "entropy_pl/estimators/ridge.py": (f"{ESTIMATORS}/test_ridge.py", ESTIMATORS),
    "entropy_pl/estimators/differences.py": (f"{ESTIMATORS}/test_combinations.py", ESTIMATORS),
    "entropy_pl/estimators/estimate.py": (
        f"{ESTIMATORS}/test_closed_forms.py",
        "tests/faults/test_untrusted.py",
        ESTIMATORS,
    ),
    "entropy_pl/estimators/ratio.py": (f"{ESTIMATORS}/test_ratio.py",),
    "entropy_pl/estimators/reward.py": (f"{ESTIMATORS}/test_reward.py", f"{ESTIMATORS}/test_reward_enumeration.py"),
    "entropy_pl/estimators/jackknife.py": (f"{ESTIMATORS}/test_jackknife.py",),
    "entropy_pl/estimators/fits.py": (f"{ESTIMATORS}/test_fits.py",),
    "entropy_pl/estimators/predictors.py": (f"{ESTIMATORS}/test_predictors.py",),
    "entropy_pl/policy/head.py": ("tests/policy/test_score.py",),
    "entropy_pl/policy/logits.py": ("tests/policy/test_score.py", "tests/policy/test_gradients.py"),
    "entropy_pl/policy/score.py": ("tests/policy/test_score.py",),
    "entropy_pl/policy/tangents.py": ("tests/policy/test_tangents.py", f"{ATTRIBUTION}/test_errors.py"),
    "entropy_pl/policy/sample.py": ("tests/policy/test_sample.py",),
    "entropy_pl/updates/displace.py": (f"{UPDATES}/test_displacement.py", f"{UPDATES}/test_shared_memory.py"),
    "entropy_pl/updates/change.py": (
        f"{UPDATES}/test_update_record.py",
        f"{UPDATES}/test_several_optimizers.py",
    ),
    "entropy_pl/updates/record.py": (f"{UPDATES}/test_update_record.py", UPDATES),
    "entropy_pl/updates/vector.py": (f"{UPDATES}/test_update_vector.py", UPDATES),
    "entropy_pl/updates/adamw.py": (f"{UPDATES}/test_adam_components.py", UPDATES),
    "entropy_pl/updates/sgd.py": (f"{UPDATES}/test_sgd_components.py", UPDATES),
    "entropy_pl/probe/engine.py": ("tests/test_probe.py",),
    "entropy_pl/probe/reduction.py": (
        "tests/test_probe_reduction.py",
        "tests/test_probe.py",
        "tests/test_probe_baselines.py",
    ),
    "entropy_pl/probe/smoothness.py": ("tests/test_smoothness.py",),
    "entropy_pl/probe/result_warnings.py": ("tests/faults/test_collapse.py",),
    "entropy_pl/probe/scores.py": ("tests/test_smoothness.py", "tests/test_probe.py", "tests/test_probe_baselines.py"),
    "entropy_pl/attribution/influence.py": (f"{ATTRIBUTION}/test_influence.py", ATTRIBUTION),
    "entropy_pl/attribution/errors.py": (f"{ATTRIBUTION}/test_errors.py", ATTRIBUTION),
    "entropy_pl/attribution/matrix.py": (f"{ATTRIBUTION}/test_matrix.py",),
    "entropy_pl/attribution/blocks.py": (f"{ATTRIBUTION}/test_blocks.py",),
    "entropy_pl/objectives/advantages.py": (f"{OBJECTIVES}/test_advantages.py",),
    "entropy_pl/objectives/losses.py": (f"{OBJECTIVES}/test_losses.py",),
    "entropy_pl/objectives/covariance.py": (f"{OBJECTIVES}/test_covariance.py",),
    "entropy_pl/rollout.py": ("tests/test_rollout.py", "tests/policy/test_score.py"),
    "entropy_pl/monitor/step_monitor.py": ("tests/callbacks/test_entropy_probe.py",),
    "entropy_pl/monitor/rendering.py": ("tests/callbacks/test_rendering.py",),
    "entropy_pl/monitor/trl_prompts.py": ("tests/callbacks/test_trl_prompts.py",),
    "entropy_pl/policy/vocabulary.py": ("tests/policy/test_vocabulary.py",),
    "entropy_pl/policy/wrapper.py": ("tests/policy/test_wrapper.py",),
    "entropy_pl/policy/positions.py": ("tests/policy/test_positions.py",),
    "entropy_pl/policy/generated.py": ("tests/policy/test_generated.py",),
    "entropy_pl/probe/sampler_gate.py": ("tests/test_sampler_gate.py",),
    "entropy_pl/policy/measured_adapter.py": ("tests/callbacks/test_adapters.py",),
    "entropy_pl/updates/check.py": (f"{UPDATES}/test_split_check.py",),
    "entropy_pl/policy/gradients.py": (f"{UPDATES}/test_shared_memory.py",),
    "entropy_pl/updates/left_out.py": ("tests/callbacks/test_optimizers_together.py",),
    "entropy_pl/policy/kernels.py": ("tests/policy/test_experts.py",),
    "entropy_pl/policy/set_aside.py": ("tests/policy/test_set_aside.py",),
    "entropy_pl/policy/duals.py": ("tests/policy/test_trained_tokens.py", "tests/policy/test_tangents.py"),
    "entropy_pl/policy/micro_batches.py": ("tests/policy/test_positions.py",),
    "entropy_pl/probe/dry_run.py": ("tests/test_dry_run.py",),
    "entropy_pl/attribution/parts.py": (f"{ATTRIBUTION}/test_errors.py",),
    "entropy_pl/records/older.py": ("tests/reporting/test_older_records.py",),
    "entropy_pl/updates/watched.py": (f"{UPDATES}/test_update_record.py", UPDATES),
}

MUTATIONS = [Mutation(file, *change, TESTS[file]) for file, changes in CHANGES.items() for change in changes]
