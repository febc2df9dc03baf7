"""Plant mistakes one at a time, and see whether the fast tests notice.

    python tests/helpers/mistakes.py              all of them (minutes); ends with status 1
                                                  if one goes unnoticed
    python tests/helpers/mistakes.py gae kl       those whose names contain a word

Each works on a copy of the project in a temporary folder; the checkout is never touched. The tests that are
likeliest to notice run first, and all the fast ones if they do not.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# {file: [(mistake, the right code, the wrong code), ...]}
MISTAKES = {
    "model.py": [
        ("log-probabilities of the state after the token", "self.hidden(tokens)[:, :-1][mask[:, 1:]]",
         "self.hidden(tokens)[:, 1:][mask[:, 1:]]"),
        ("sampling without its temperature", "(logits / (temperature or 1.0)).softmax", "logits.softmax"),
        ("what a row goes on with after its end", "tokens[rows, position] = chosen * running",
         "tokens[rows, position] = chosen"),
        ("answers longer than they are", "ends[rows] += running", "ends[rows] += 1"),
        ("end token left out of the rollout's mask", "(column < ends[:, None])",
         "(column < ends[:, None] - 1)"),
        ("a cached row reads another row's position",
         "torch.arange(cache[0].shape[3], device=tokens.device) > positions ",
         "torch.arange(cache[0].shape[3], device=tokens.device) > positions[:1] "),
        ("written out, attention sees the next token", "dtype=q.dtype).triu(1)", "dtype=q.dtype).triu(2)"),
        ("written out, heads share others' keys", "x.repeat_interleave(H // self.config.n_kv_head, dim=1)",
         "x.repeat(1, H // self.config.n_kv_head, 1, 1)"),
        ("written out, attention without its scale", "alpha=1 / math.sqrt(D))", "alpha=1.0)"),
        ("every logit waits for the backward pass", "if len(x) > rows and torch.is_grad_enabled():",
         "if False:"),
        ("only the first logits are temperate", "read(some, chosen, temperature, entropy, entropy_grad)",
         "read(some, chosen, temperature if not found else 1.0, entropy, entropy_grad)"),
        ("every token drawn with the same noise", "uniform(seeds[rows], step)", "uniform(seeds[rows], 0)"),
        ("a row's noise depends on its place in the batch", "uniform(seeds[rows], step)",
         "uniform(seeds[:len(rows)], step)"),
        ("logits are rounded on a GPU", "if x.is_cuda:", "if False:"),
        ("top-k keeps one too many", "ranked[:, top_k:] = 0", "ranked[:, top_k + 1:] = 0"),
        ("top-p leaves out the token that crosses p", "beyond = ranked.cumsum(-1) - ranked >= top_p",
         "beyond = ranked.cumsum(-1) >= top_p"),
        ("top-p of all, not of top-k's", "top_p * ranked.sum(-1, keepdim=True)", "top_p"),
        ("rows that leave the batch take others' cache with them",
         "cache[i] = layer[:, running]", "cache[i] = layer[:, :int(running.sum())]"),
        ("score read one token too early", "self(tokens).gather(1, lengths[:, None] - 1)",
         "self(tokens).gather(1, (lengths[:, None] - 2).clamp(min=0))"),
        ("entropy without its sign", "-torch.linalg.vecdot(logp.exp(), logp)",
         "torch.linalg.vecdot(logp.exp(), logp)"),
        ("rotary positions turned back", "b * cos + a * sin], dim=-1)", "b * cos - a * sin], dim=-1)"),
        ("queries are not normed", "q, k = self.q_norm(q), self.k_norm(k)", "k = self.k_norm(k)"),
        ("slow waves are kept", "f = kept * f + (1 - kept) * f / s", "f = (1 - kept) * f + kept * f / s"),
        ("adapters count alpha", "self.scale = alpha / rank", "self.scale = alpha"),
        ("an adapter starts with noise",
         "self.B = nn.Parameter(torch.zeros(", "self.B = nn.Parameter(torch.randn("),
        ("an adapter is merged twice", "self.scale, self.A, self.B = 0.0, None, None", "pass"),
        ("the base is trained with its adapters",
         "        self.requires_grad_(False)\n        for name, module",
         "        for name, module"),
        ("a scalar head is frozen under adapters", "            self.head.requires_grad_(True)\n",
         "            pass\n"),
        ("gate and product change places", "F.silu(self.gate(x)) * self.up(x)",
         "F.silu(self.up(x)) * self.gate(x)"),
    ],
    "runtime/nf4.py": [
        ("NF4 has no zero", "torch.cat([-quantiles(7)[:-1], quantiles(8).flip(0)])",
         "torch.cat([-quantiles(8)[:-1], quantiles(7).flip(0)])"),
        ("halves of a byte change places", "index[::2] * 16 + index[1::2]", "index[1::2] * 16 + index[::2]"),
        ("scales without their mean", "* self.spread).flatten() + self.mean", "* self.spread).flatten()"),
        ("a packed layer without its bias",
         "F.linear(x, W().to(x.dtype), b)", "F.linear(x, W().to(x.dtype))"),
        ("the gradient of a packed layer", "gradient @ ctx.W().to(gradient.dtype)",
         "gradient @ ctx.W().to(gradient.dtype) * 0.5"),
        ("a merged layer stays packed", "        self.__class__ = Linear ", "        pass "),
    ],
    "data/judge.py": [
        ("a judge's bias stays in", "d, same = (first - second) / 2,", "d, same = first,"),
        ("the second order is the first", "for step in (1, -1)]", "for step in (1, 1)]"),
        ("labels say the worse is better", "if p >= 0.5 else", "if p < 0.5 else"),
        ("how sure a judge is gets lost", "round(max(p, 1 - p), 4)", "1.0"),
    ],
    "data/feedback.py": [
        ("a ranking upside down", "sum(other > x for other in some)", "sum(other < x for other in some)"),
        ("a judge's preference counts for one side", "        scores[n][j] -= d\n", ""),
    ],
    "data/answers.py": [
        ("an answer without an end keeps its score", "x if a.ended else -torch.inf", "x"),
    ],
    "loop.py": [
        ("a round learns from its own labels alone", "join(labels, data)", "join(labels[-1:], data)"),
        ("each round samples from the SFT model", "label(cfg, policy, name, cfg.labels,",
         "label(cfg, cfg.init, name, cfg.labels,"),
        ("rejection sampling keeps the worst", "if rank == 1]", "if rank == max(p.ranks)]"),
    ],
    "runtime/adapters.py": [
        ("adapters are always new", "if rank == 0 or {name", "if True or {name"),
        ("other adapters are lost", "            layer.merge()\n", "            layer.scale = 0.0\n"),
        ("new tokens are frozen", "if rank > 0 and model.has_new_tokens:", "if False:"),
        ("alpha is not read", "alpha * int(own.sum()) / len(A))", "about[\"lora_alpha\"])"),
        ("a fused layer is not parted", "own = (part != 0).any(0) | ~(B != 0).any(0)",
         "own = torch.ones(len(A), dtype=torch.bool)"),
        ("the score's constant is lost", "torch.tensor([about.get(\"score_bias\", 0.0)])", "torch.zeros(1)"),
    ],
    "runtime/folders.py": [
        ("a new head is zero", "        model.head.to_empty(device=\"cpu\").apply(model._init)\n",
         "        model.head.to_empty(device=\"cpu\")\n        model.head.weight.data.zero_()\n"),
        ("keys for values", "self_attn.k_proj", "self_attn.v_proj"),
        ("norms change places", "layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"),
        ("the score's constant is lost", "config.source.get(\"score_bias\", 0.0)", "0.0"),
        ("a window is not seen", "min(shape[\"block_size\"], about[\"sliding_window\"])",
         "shape[\"block_size\"]"),
        ("GPT-2's matrices as they lie", "return family.transposed and name", "return False and name"),
        ("scaling is not read", "if \"llama3\" in (about", "if \"llama-3\" in (about"),
        ("the rest of a config is lost", "**shape, **(config.source or {})", "**shape"),
        ("an unknown tensor is left out", "    if left:\n", "    if False:\n"),
    ],
    "runtime/models.py": [
        ("new tokens are zero", "torch.cat([weight, mean.expand", "torch.cat([weight, 0 * mean.expand"),
        ("the output layer does not grow", "layers.append(model.head)", "pass"),
    ],
    "sft.py": [
        ("SFT loss as a mean per row", "return -torch.where(mask, logprobs, 0).sum() / mask.sum()",
         "return -(torch.where(mask, logprobs, 0).sum(-1) / mask.sum(-1)).mean()"),
        ("SFT micro-batches weighed by rows", "weights, lengths = [sum(d.learn) for d in demonstrations],",
         "weights, lengths = [1 for d in demonstrations],"),
        ("SFT's schedule a step ahead", "schedule(run.step, steps", "schedule(run.step + 1, steps"),
        ("held-out loss of the training set",
         "held_out_loss = mean_loss(run.average, model, run, held_out)\n    print",
         "held_out_loss = mean_loss(run.average, model, run, examples)\n    print"),
        ("every epoch but one", "steps = cfg.epochs * math.ceil(len(examples) / cfg.batch)",
         "steps = math.ceil(len(examples) / cfg.batch)"),
        ("weight decay not handed on", "make_optimizer(model, cfg.lr, cfg.weight_decay)",
         "make_optimizer(model, cfg.lr)"),
    ],
    "reward_model.py": [
        ("a soft label's other side has no margin", "F.logsigmoid(-gaps - margin)", "F.logsigmoid(-gaps)"),
        ("reward model with chosen and rejected swapped", "-F.logsigmoid(chosen - rejected - margin)",
         "-F.logsigmoid(rejected - chosen - margin)"),
        ("ranking upside down", "better = present & (ranks[:, :, None] < ranks[:, None, :])",
         "better = (ranks > 0)[:, None, :] & (ranks[:, :, None] > ranks[:, None, :])"),
        ("margin never reaches the loss", "ranking_loss(scores, ranks, margin, probability)",
         "ranking_loss(scores, ranks, None, probability)"),
        ("held-out accuracy of the training set", "evaluate(model, run, held_out)",
         "evaluate(model, run, examples)"),
        ("score scaled but not shifted", "model.head.bias.sub_(mean).div_(deviation)",
         "model.head.bias.div_(deviation)"),
        ("score shifted after it was scaled", "model.head.bias.sub_(mean).div_(deviation)",
         "model.head.bias.div_(deviation).sub_(mean)"),
        ("score divided by its variance", "max(scores.std().item(), 1e-6)", "max(scores.var().item(), 1e-6)"),
        ("absent answers count as best", "ranks.masked_fill(absent, ranks.max() + 1).argmin", "ranks.argmin"),
        ("a winner as long as the loser counts as longer", '("same_length", longer.abs() <= 4)',
         '("same_length", longer <= 4)'),
        ("calibration by the gap's sign alone", "said, won, rows = torch.sigmoid(gaps.abs())",
         "said, won, rows = torch.sigmoid(gaps)"),
    ],
    "dpo.py": [
        ("fresh answers of the reference", "answers = sample(run, model, tokenizer,",
         "answers = sample(run, reference, tokenizer,"),
        ("fresh answers, the old answers' reference",
         "or old                    # old: where all answers tie\n    add_reference(reference, run, found)",
         "or old\n    add_reference(model, run, found)"),
        ("KL of a look the other way round", "(logprobs - ref_logprobs).sum(1)",
         "(ref_logprobs - logprobs).sum(1)"),
        ("entropy of a look per answer", '(found["entropy"].mean() / length)', '(found["entropy"].mean())'),
        ("a soft label is taken as sure", "losses = p * losses + (1 - p) * swapped", "losses = losses"),
        ("records that do not fit are counted", "math.ceil(len(examples) / cfg.batch)",
         "math.ceil(len(preferences) / cfg.batch)"),
        ("DPO with chosen and rejected swapped", "    h = chosen_logratios - rejected_logratios\n",
         "    h = rejected_logratios - chosen_logratios\n"),
        ("reference left trainable", "chosen_logratios = policy_chosen - ref_chosen.detach()",
         "chosen_logratios = policy_chosen - ref_chosen"),
        ("smoothed labels on the wrong side",
         "-(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing",
         "-label_smoothing * F.logsigmoid(beta * h) - (1 - label_smoothing)"),
        ("IPO's margin twice too large", "(h - 1 / (2 * beta)) ** 2", "(h - 1 / beta) ** 2"),
        ("imitation of every winner", "torch.where(is_best, nll, 0)", "nll"),
        ("imitation as a sum over tokens", "-logprobs[b, chosen] / tokens[b, chosen]",
         "-logprobs[b, chosen]"),
        ("only the policy is normalised by length",
         "policy, reference = (x / tokens.clamp(min=1) for x in (logprobs, ref_logprobs))",
         "policy = logprobs / tokens.clamp(min=1)"),
        ("DPO's pairs weighed by prompts", "weights=[len(c.pairs) for c in comparisons]",
         "weights=[1 for c in comparisons]"),
        ("reference of other answers", "zip(comparisons, found[\"logprobs\"].tolist())",
         "zip(comparisons, found[\"logprobs\"].roll(1, 0).tolist())"),
        ("prompt counted in an answer's log-probability", "(column >= starts[:, None])",
         "(column >= 0 * starts[:, None])"),
        ("all records in place of the first ones", "preferences = preferences[:cfg.records]",
         "preferences = preferences[-cfg.records:]"),
    ],
    "ppo.py": [
        ("a program is told another prompt", "program(prompts[i], answers[i])",
         "program(prompts[0], answers[i])"),
        ("a program in place of, not beside, the reward model",
         'learned = cfg.reward_model_coef * batch["scores"] if', "learned = 0.0 if"),
        ("an answer is in its own baseline", "(R.sum(1, keepdim=True) - R) / (group - 1)",
         "R.mean(1, keepdim=True)"),
        ("groups do not stand together", "[prompt for prompt in chosen for _ in range(cfg.group)]",
         "chosen * cfg.group"),
        ("GRPO multiplies by the length", "(lengths.mean() / lengths)", "(lengths / lengths.mean())"),
        ("GRPO's deviation is left out", "    if divide_by_std:\n", "    if False:\n"),
        ("GRPO's switches are not handed on", "cfg.divide_by_std, cfg.divide_by_length)", ")"),
        ("an answer earns its score alone", "advantages = rloo(rewards.sum(1), cfg.group)",
         "advantages = rloo(batch[\"scores\"], cfg.group)"),
        ("another temperature in bfloat16",
         'found["old_logprobs"] = nets["actor"].logprobs(tokens, mask, cfg.temperature)',
         'found["old_logprobs"] = nets["actor"].logprobs(tokens, mask)'),
        ("KL reward with the wrong sign", "-kl_coef * (logprobs - ref_logprobs)",
         "kl_coef * (logprobs - ref_logprobs)"),
        ("mean per row in place of per token", "return torch.where(mask, x, 0).sum() / mask.sum()",
         "return (torch.where(mask, x, 0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()"),
        ("score added on the padding", "last = (mask * column).argmax(dim=1)",
         "last = (mask * 0 + column).argmax(dim=1)"),
        ("advantages not detached", "    advantages = advantages.detach()\n", ""),
        ("old log-probabilities recomputed", 'policy_loss(logprobs, b["old_logprobs"]',
         "policy_loss(logprobs, logprobs"),
        ("value of the state after the action",
         "return torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1) * mask", "return out * mask"),
        ("temperature missing from the new log-probabilities",
         'logprobs(b["tokens"], b["mask"], cfg.temperature, entropy=True,',
         'logprobs(b["tokens"], b["mask"], entropy=True,'),
        ("advantage that looks back in place of ahead", "for t in reversed(range(rewards.shape[1])):",
         "for t in range(rewards.shape[1]):"),
        ("GAE without λ", "delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
        ("clipping the wrong way", "-masked_mean(torch.min(unclipped, clipped), mask)",
         "-masked_mean(torch.max(unclipped, clipped), mask)"),
        ("value loss takes the smaller error", "0.5 * masked_mean(torch.max(",
         "0.5 * masked_mean(torch.min("),
        ("β adapts the wrong way", "min(max(kl / self.target - 1, -0.2), 0.2)",
         "min(max(1 - kl / self.target, -0.2), 0.2)"),
        ("an update that never stops", 'stats["approx_kl"] > cfg.update_kl', "False"),
        ("an update that stops at the KL to the reference's scale", 'stats["approx_kl"] > cfg.update_kl',
         'stats["approx_kl"] > 4 * cfg.update_kl'),
        ("a step that is dropped leaves its gradients", "            optimizer.zero_grad()\n",
         "            pass\n"),
        ("a dropped step counts as taken", "len(steps) if taken else len(steps) - 1", "len(steps)"),
        ("an unfinished answer keeps its score",
         'torch.where(batch["ended"], batch["scores"], cfg.no_end_score)', 'batch["scores"]'),
        ("a finished answer loses its score", 'torch.where(batch["ended"], batch["scores"]',
         'torch.where(~batch["ended"], batch["scores"]'),
        ("critic trained uphill", '{"loss": loss, "value_loss": loss,',
         '{"loss": -loss, "value_loss": loss,'),
        ("entropy bonus as a penalty", "loss - cfg.entropy_coef * entropy",
         "loss + cfg.entropy_coef * entropy"),
        ("entropy's gradient forgotten", "entropy_grad=cfg.entropy_coef > 0", "entropy_grad=False"),
        ("controller told the movement of the update", 'controller.update(metrics["kl"], len(prompts))',
         'controller.update(metrics["approx_kl"], len(prompts))'),
        ("controller told a batch of one", 'controller.update(metrics["kl"], len(prompts))',
         'controller.update(metrics["kl"], 1)'),
        ("a fixed β adapts", "    if cfg.adaptive_kl:\n        controller",
         "    if True:\n        controller"),
        ("rewards with the first β for ever", "estimate(cfg, batch, controller.coef)",
         "estimate(cfg, batch, cfg.kl_coef)"),
        ("reference that is the policy", 'nets["reference"].logprobs(tokens',
         'nets["actor"].logprobs(tokens'),
        ("temperature missing from the reference",
         '"ref_logprobs": nets["reference"].logprobs(tokens, mask, cfg.temperature)',
         '"ref_logprobs": nets["reference"].logprobs(tokens, mask)'),
        ("temperature missing from sampling", "cfg.max_new_tokens, cfg.temperature,",
         "cfg.max_new_tokens, 1.0,"),
        ("old values of the reward model", 'state_values(nets["critic"], tokens, mask)',
         'state_values(nets["reward"], tokens, mask)'),
        ("critic at the policy's learning rate", "cfg.critic_lr * factor", "cfg.lr * factor"),
        ("learning rate without its schedule", "cfg.lr * factor", "cfg.lr"),
        ("rewards shifted too", "whiten(rewards, mask, shift_mean=False)", "whiten(rewards, mask)"),
        ("advantages never whitened", "advantages = whiten(advantages, mask)", "pass"),
        ("critic learns advantages", 'value_loss(values, b["old_values"], b["returns"]',
         'value_loss(values, b["old_values"], b["advantages"]'),
        ("minibatches weighed by rows", 'weights, lengths = batch["mask"][rows].sum(1),',
         "weights, lengths = [1] * len(rows),"),
        ("the same minibatches in each epoch", 'torch.randperm(len(batch["tokens"]))',
         'torch.arange(len(batch["tokens"]))'),
        ("PTX unlearns", "-cfg.ptx_coef * masked_mean(", "cfg.ptx_coef * masked_mean("),
        ("PTX without its weight", "-cfg.ptx_coef * masked_mean(", "-masked_mean("),
        ("KL per token logged as per answer", '"kl": log_ratio.sum(1).mean().item()',
         '"kl": log_ratio.mean().item()'),
        ("explained variance of the advantages",
         'explained_variance(batch["old_values"], batch["returns"], mask)',
         'explained_variance(batch["old_values"], batch["advantages"], mask)'),
        ("Adam's ε left at its default", "make_optimizer(nets[name], cfg.lr, eps=1e-5)",
         "make_optimizer(nets[name], cfg.lr)"),
        ("β forgotten by checkpoints", "run.resume(controller=controller, ", "run.resume("),
        ("critic forgotten by checkpoints", "**{name: nets[name] for name in optimizers},",
         'actor=nets["actor"],'),
    ],
    "evaluate.py": [
        ("a tie counts as a win", "0.5 if abs(a - b) < 1e-5 else float(a > b)", "float(a >= b)"),
        ("interval of 90 %", "torch.tensor([0.025, 0.975])", "torch.tensor([0.05, 0.95])"),
        ("answers resampled in place of prompts", ".view(-1, n).mean(1)", ".view(-1, 1).mean(1)"),
        ("the worst of n", "[max(answers[k * n:(k + 1) * n])[1]", "[min(answers[k * n:(k + 1) * n])[1]"),
        ("KL the wrong way round", "(model.logprobs(tokens, mask) - self.reference.logprobs(tokens, mask))",
         "(self.reference.logprobs(tokens, mask) - model.logprobs(tokens, mask))"),
        ("best-of-n's KL without its correction", "return math.log(n) - (n - 1) / n", "return math.log(n)"),
        ("training prompts in the report", '_, prompts = loading.load("prompts", cfg.data',
         'prompts, _ = loading.load("prompts", cfg.data'),
        ("every checkpoint draws the same noise",
         "answers = self.answers(model, self.cfg.samples, noise=number)",
         "answers = self.answers(model, self.cfg.samples, noise=0)"),
        ("the judge hears of the next prompt",
         "prompts = [p for p in self.prompts for _ in range(self.cfg.samples)]",
         "prompts = [p for _ in range(self.cfg.samples) for p in self.prompts]"),
        ("word pairs across answers", "for text in texts for pair in zip(text.split(), text.split()[1:])",
         'for text in [" ".join(texts)] for pair in zip(text.split(), text.split()[1:])'),
        ("the reward beside an answer is the judge's", 'f", reward {c.reward[i * n]:.2f}"',
         'f", reward {c.judge[i * n]:.2f}"'),
    ],
    "runtime/sharding.py": [
        ("each network has a base of its own", "if frozen is not None and not p.requires_grad:", "if False:"),
        ("other weights are taken for the base",
         "if x.dtype == dtype and torch.equal(x, p)), p.data)", "if True), p.data)"),
        ("rotations are rounded under fsdp", " " * 46 + "cast_forward_inputs=False)", " " * 46 + ")"),
        ("a process keeps its own gradients", "            x.copy_(part.view_as(x))", "            pass"),
    ],
    "runtime/compute.py": [
        ("a filler counts", "share = 0.0 if is_filler else", "share ="),
        ("every micro-batch counts alike", "sum(weights[i] for i in piece) / sum(weights)",
         "1 / len(passes)"),
        ("rows of a map in the order of their lengths", "return {name: x[back.to(x.device)].to(self.device)",
         "return {name: x.to(self.device)"),
        ("a filler's rows in a map", "            if not is_filler:\n", "            if True:\n"),
        ("an offloaded network stays on the device", "                p.data = x\n",
         "                pass\n"),
        ("a bound on tokens without their padding", "(sequences + more) * longest > micro_tokens",
         "sequences + more * longest > micro_tokens"),
        ("rows with several sequences count as one",
         "(1, length) if isinstance(length, int) else (len(length), max(length))",
         "(1, length) if isinstance(length, int) else (1, max(length))"),
        ("processes that go through different numbers of passes",
         "while len(passes) < max(len(theirs) for theirs in everyone):",
         "while len(passes) < min(len(theirs) for theirs in everyone):"),
        ("ended when the answer is full", '"ended": last == (', '"ended": last != ('),
        ("networks compute as they remember", "if self.bfloat16 and not is_frozen(model):", "if False:"),
    ],
    "runtime/precision.py": [
        ("the copies are never renewed", "if versions != self.seen:", "if self.seen is None:"),
        ("the gradient of the last micro-batch alone", "if p.grad is None else p.grad.add_(copy.grad)", ""),
        ("scores in bfloat16", 'return ".nf4." in name or (', 'return ".nf4." in name and ('),
        ("weights remember in bfloat16", "if bfloat16 and not p.requires_grad and", "if bfloat16 and"),
        ("the copies stay where the weights were", "module._parameters[name] = p", "pass"),
    ],
    "runtime/run.py": [
        ("the same randomness at every step", 'random.Random(f"{self.cfg.seed}/{step}")',
         'random.Random(f"{self.cfg.seed}")'),
        ("gradients never clipped", "clip_grad_norm_(parameters, self.cfg.max_norm or math.inf)",
         "clip_grad_norm_(parameters, math.inf)"),
        ("learning rate never set", '                group["lr"] = lr\n', "                pass\n"),
        ("gradients never forgotten", "        optimizer.zero_grad()\n        return norm",
         "        return norm"),
        ("bad steps count for ever", "            self.failed_in_a_row[id(optimizer)] = 0\n", ""),
        ("a step that is not finite is taken", "if math.isfinite(norm) and math.isfinite(loss):", "if True:"),
        ("steps after the checkpoint stay in the log", 'json.loads(line)["step"] <= self.step',
         'json.loads(line)["step"] > 0'),
        ("a resumed run draws the first step's noise", "self.begin(self.checkpoints.load(parts))",
         "self.step = self.checkpoints.load(parts)"),
        ("a checkpoint of a step that failed", "if not any(self.failed_in_a_row.values()):", "if True:"),
        ("another run's settings go unnoticed",
         "if name in now and was.get(name) != json.loads(json.dumps(now[name])):", "if False:"),
        ("warned at every step", "            if text not in self.warned:\n", "            if True:\n"),
    ],
    "runtime/checkpoints.py": [
        ("the writer gets the live tensors", '.detach().to("cpu", copy=True)', '.detach().to("cpu")'),
        ("Adam's second moment forgotten", 'for key, x in moments.items()}',
         'for key, x in moments.items() if key != "exp_avg_sq"}'),
        ("the checkpoint before the last one", "sorted(listdir(self.shards), reverse=True)",
         "sorted(listdir(self.shards))"),
        ("weights that ran off are saved", "        if not is_finite(state):\n            return\n", ""),
    ],
    "runtime/optimizer.py": [
        ("biases and norms decay", 'if p.dim() < 2], "weight_decay": 0.0}',
         'if p.dim() < 2], "weight_decay": weight_decay}'),
        ("another β₂", "betas=(0.9, 0.99)", "betas=(0.9, 0.999)"),
        ("warm-up starts at 0", "return (step + 1) / warmup", "return step / warmup"),
        ("decay that counts the warm-up", "done = (step - warmup) / max(1, total - warmup)",
         "done = step / max(1, total)"),
    ],
    "runtime/files.py": [
        ("only a file's first piece is checked",
         "for start in range(0, max(1, os.path.getsize(path)), size)]", "for start in [0]]"),
        ("a folder that belongs to everybody", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    ],
    "data/tokenizer.py": [
        ("loss on the prompt", 'message["role"] == "assistant"', 'message["role"] != "system"'),
        ("two system messages", 'if self.system and messages[0]["role"] != "system":', "if self.system:"),
        ("the end token fills batches", "self.pad = special[best_first[0]]", "self.pad = self.end"),
        ("characters stay apart", "self.composed = bool(about", "self.composed = bool(not about"),
        ("the wrong half is merged first", "i = pairs.index(min(pairs))", "i = pairs.index(max(pairs))"),
        ("numbers stay whole", 'if last["use_regex"] and steps == [{"type": "Digits"',
         'if last["use_regex"] and steps != [{"type": "Digits"'),
    ],
    "data/batches.py": [
        ("the same order in every epoch", 'random.Random(f"{seed}/{epoch}")', 'random.Random(f"{seed}")'),
        ("a tie counts as a pair", "if self.ranks[i] < self.ranks[j]", "if self.ranks[i] <= self.ranks[j]"),
        ("answers that are too long are kept",
         "length(rest) > block_size:", "length(rest) > 2 * block_size:"),
        ("a system message goes with the oldest turn", "return system + messages[asked[1]:]",
         "return messages[asked[1]:]"),
        ("an answer is what is left of a conversation", "asked[1]:]", "asked[1] + 1:]"),
        ("no share of records is too large", "if dropped > max_dropped * len(examples):", "if False:"),
    ],
    "data/loading.py": [
        ("held-out records in the training set", "if i % 10 != 9]", "if i % 10 != 10]"),
        ("ties stay in", "if len(set(p.ranks)) > 1]", "if len(set(p.ranks)) > 0]"),
    ],
    "data/annotators.py": [
        ("a taste for short answers", "self.length * words / 10", "-self.length * words / 10"),
        ("the worst answer ranked first", "key=lambda i: -noisy[i]", "key=lambda i: noisy[i]"),
        ("a ceiling below chance", "max(x, 1 - x)", "min(x, 1 - x)"),
    ],
    "data/records.py": [
        ("the rejected answer is the chosen one",
         'answers = [chosen[-1]["content"], rejected[-1]["content"]]',
         'answers = [rejected[-1]["content"], chosen[-1]["content"]]'),
        ("records of no use do not count", "out.append(None)", "pass"),
        ("malformed records are left out", "    if malformed:\n", "    if len(malformed) > total / 2:\n"),
        ("no share of records of no use is too large",
         "if len(unusable) > max_dropped * total:", "if False:"),
        ("the input is lost", '                text += "\\n\\n" + more\n', "                pass\n"),
        ("margins are lost", "float(margin), float(probability))", "0.0, float(probability))"),
    ],
}
# Tests beyond the file's own that are likely to notice.
LIKELY = {"dpo.py": ["test_run"], "model.py": ["test_ppo", "test_adapters"],
          "runtime/sharding.py": ["test_adapters"], "runtime/nf4.py": ["test_adapters"],
          "data/answers.py": ["test_feedback"],
          "runtime/compute.py": ["test_ppo", "test_dpo"],
          "runtime/optimizer.py": ["test_sft"], "ppo.py": ["test_known_answers", "test_run"],
          "runtime/run.py": ["test_checkpoints", "test_sft", "test_ppo"]}


def pytest_args(path):
    """The test files to run first for a mistake in a source file, then all."""
    own = "test_" + os.path.basename(path).removesuffix(".py")
    first = [f"tests/{name}.py" for name in [own, *LIKELY.get(path, [])]]
    return [[name for name in first if os.path.exists(os.path.join(ROOT, name))], ["tests"]]


def plant(path, name, right, wrong):
    """Whether the fast tests notice: (name, the test that does or None, seconds)."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__"))
        target = os.path.join(copy, path)
        with open(target, encoding="utf-8") as f:
            code = f.read()
        if code.count(right) != 1:
            return name, None, f"the right code is found {code.count(right)} times in {path}"
        with open(target, "w", encoding="utf-8") as f:
            f.write(code.replace(right, wrong))
        for files in pytest_args(path):
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
            lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            if done.returncode != 0:
                by = lines[0].split(" - ")[0] if lines else f"pytest's status {done.returncode}"
                return name, by, f"{time.time() - started:.0f} s"
    return name, None, f"{time.time() - started:.0f} s"


def main(words):
    chosen = [(path, *mistake) for path, mistakes in MISTAKES.items() for mistake in mistakes
              if not words or any(word in mistake[0] or word in path for word in words)]
    missed = []
    with ThreadPoolExecutor(max_workers=max(1, os.cpu_count())) as pool:
        for name, by, took in pool.map(lambda m: plant(*m), chosen):
            print(f"{'caught' if by else 'MISSED'}  {name}  ({took}; {by})", flush=True)
            if not by:
                missed.append(name)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mistakes caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
