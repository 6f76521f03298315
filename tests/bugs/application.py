"""Bugs of the application: training, runs, checkpoints, text, models, the command line."""

from __future__ import annotations

from bugs.bug import Bug

_LM = "lm/"
_LAB = "lab/"
_TRAIN = "test_train.py test_training_facts.py"
_RUN = "test_run.py test_run_folder.py"
_SURVIVAL = "test_survival.py::"
_MODEL = "lm/test_model.py"

BUGS = [
    Bug(
        _LAB + "train.py",
        "return config.lr * (step + 1) / config.warmup",
        "return config.lr * step / config.warmup",
        _TRAIN,
    ),
    Bug(
        _LAB + "evaluation.py",
        "        total += float(loss) * len(x)\n",
        "        total += float(loss)\n",
        _TRAIN,
    ),
    Bug(
        _LAB + "train.py",
        "if seen.settled and seen.loss < progress.best_loss:",
        "if seen.settled and seen.loss > progress.best_loss:",
        _TRAIN + " test_run.py",
    ),
    Bug(
        _LAB + "train.py",
        "if seen.settled and seen.loss < progress.best_loss:",
        "if seen.loss < progress.best_loss:",
        "test_guard.py",
    ),
    Bug(
        _LAB + "train.py",
        "if state.average is not None and not progress.in_a_row():",
        "if state.average is not None:",
        "test_average.py",
    ),
    Bug(
        _LAB + "guard.py",
        "step]\n        optimiser.zero_grad(set_to_none=True)\n",
        "step]\n",
        _TRAIN,
    ),
    Bug(_LAB + "guard.py", "at > step - SHARE * limit", "at > 0", "test_guard.py"),
    Bug(
        _LAB + "guard.py", "        if many > limit:", "        if many >= limit:", "test_guard.py"
    ),
    Bug(
        _LAB + "guard.py",
        "if progress.refused == step == self._config.steps:",
        "if progress.refused == step:",
        "test_guard.py",
    ),
    Bug(
        _LAB + "building.py",
        "            parameter.requires_grad_(False)\n",
        "            pass\n",
        "test_rules_in_the_application.py",
    ),
    Bug(
        _LAB + "building.py",
        'output="head", seed=config.seed, batch_axis=axis)',
        'output="head", batch_axis=axis)',
        "test_rules_in_the_application.py " + _TRAIN,
    ),
    Bug(
        _LAB + "guard.py",
        "within(config.adjoint_limit, seen.adjoint_result,",
        "within(config.free_limit, seen.adjoint_result,",
        _TRAIN,
    ),
    Bug(
        _LAB + "guard.py",
        "and within(config.error_limit, seen.result, seen.state_error)",
        "and within(config.error_limit, seen.result, seen.free_residual)",
        "test_guard.py " + _TRAIN,
    ),
    Bug(
        _LAB + "state.py",
        '        self.batches.generator.set_state(extra["batches"])\n',
        "",
        _RUN,
    ),
    Bug(
        _LAB + "state.py",
        "            self.stabiliser.load_state_dict(kept)\n",
        "            pass\n",
        _RUN,
    ),
    Bug(
        _LAB + "metrics.py",
        "self._begin(content[:size])",
        "self._begin(content)",
        _RUN,
    ),
    Bug(
        _LAB + "state.py",
        '            self.average.n_averaged.copy_(saved.extra["averaged"])\n',
        "            pass\n",
        "test_average.py",
    ),
    Bug(
        _LAB + "metrics.py",
        'or "final_validation_loss" in record:',
        "or not record:",
        "test_metrics.py",
    ),
    Bug(
        _LAB + "checkpoint.py",
        'key: value if key == "step" else like(value, parameter)',
        "key: value.to(parameter)",
        "test_checkpoint.py",
    ),
    Bug(
        _LAB + "checkpoint.py",
        "found.keys() != MOMENTS or not _fit(parameter, found):",
        "False:",
        "test_checkpoint.py",
    ),
    Bug(
        _LM + "text/batches.py",
        "return both[:, :-1].contiguous(), both[:, 1:].contiguous()",
        "return both[:, :-1].contiguous(), both[:, :-1].contiguous()",
        "lm/test_batches.py",
    ),
    Bug(
        _LM + "text/batches.py",
        "        last = len(self.tokens) - self.context\n",
        "        last = len(self.tokens) - self.context - 1\n",
        "lm/test_batches.py",
    ),
    Bug(
        _LM + "text/prepared.py",
        'dtype = width_of(len(tokenizer)).newbyteorder("<")',
        'dtype = width_of(len(tokenizer)).newbyteorder(">")',
        "lm/test_prepared.py",
    ),
    Bug(
        _LM + "text/sources.py",
        "return replace(source, train=source.train[:cut], validation=source.train[cut:])",
        "return replace(source, train=source.train, validation=source.train[cut:])",
        "lm/test_corpora.py",
    ),
    Bug(
        _LM + "model.py",
        "model.positions.weight[start:end]",
        "model.positions.weight[: end - start]",
        "lm/test_generation.py",
    ),
    Bug(_LM + "model.py", ".tril(T - t)", ".tril(T - t + 1)", "lm/test_generation.py"),
    Bug(
        _LM + "model.py",
        "logits = model(ids[:, -context:])[0][:, -1]",
        "logits = model(ids[:, :context])[0][:, -1]",
        "lm/test_generation.py",
    ),
    Bug(
        _LM + "model.py",
        "logits = self._read_out(self.block(x, cost=cost))",
        "logits = self._read_out(self.block(x))",
        _MODEL + " test_train.py",
    ),
    Bug(
        _LM + "model.py",
        "chances = (below / temperature).softmax(-1).float()",
        "chances = (below * temperature).softmax(-1).float()",
        "lm/test_generation.py test_sample.py",
    ),
    Bug(
        _LM + "model.py",
        "            self.head.weight = self.tokens.weight\n",
        "            self.head.weight = nn.Parameter(self.tokens.weight.clone())\n",
        _MODEL,
    ),
    Bug(
        _LAB + "settings.py",
        "if other != self.model and given:",
        "if False:",
        "test_config.py test_train.py test_options_are_used.py",
    ),
    Bug(
        _LAB + "config.py",
        "            seen[key.tag, key.value] = key.start_mark\n",
        "",
        "test_lists.py",
    ),
    Bug(
        _LAB + "choices.py",
        "{**others, **ours}",
        "{**ours, **others}",
        "test_values.py",
    ),
    Bug(_LAB + "values.py", "    if depth > DEEPEST:\n", "    if False:\n", "test_values.py"),
    Bug(
        _LAB + "values.py",
        'repr(value), "") == value:\n',
        'repr(value), "") is not None:\n',
        "test_values.py",
    ),
    Bug(
        _LAB + "values.py",
        "        if names.count(name) > 1:\n",
        "        if False:\n",
        "test_values.py",
    ),
    Bug(
        _LAB + "words.py",
        "return Call(call.name, (), {**given, name: after})",
        "return Call(call.name, (), {name: after})",
        "test_config.py test_cli.py",
    ),
    Bug(
        _LAB + "values.py",
        "if a == value and type(a) is type(value) or",
        "if a == value or",
        "test_config.py test_values.py",
    ),
    Bug(
        _LAB + "sample_command.py",
        "temperature=temperature, top_k=top_k, generator=generator)",
        "temperature=temperature, generator=generator)",
        "test_sample.py test_options_are_used.py",
    ),
    Bug(
        "files.py",
        "        fresh.unlink(missing_ok=True)\n",
        "        pass\n",
        "test_files.py",
    ),
    Bug("files.py", "        sync(fresh)\n", "", "test_files.py"),
    Bug("files.py", "        fresh.chmod(mode)", "        pass", "test_files.py"),
    Bug(
        _LAB + "checkpoint.py",
        "            if _sum(tensor) != sums[name]:\n",
        "            if False:\n",
        "test_checkpoint.py",
    ),
    Bug(
        _LAB + "checkpoint.py",
        "            for _ in _verified(fresh, header):\n",
        "            for _ in ():\n",
        "test_checkpoint.py",
    ),
    Bug(
        _LAB + "checkpoint.py",
        "if before is not None and path.exists():",
        "if False:",
        "test_checkpoint.py",
    ),
    Bug(
        _LAB + "run.py",
        "                state.draw_again(before)",
        "                pass",
        _SURVIVAL + "test_a_step_that_ends_the_run_leaves_what_was_before_it",
    ),
    Bug(
        _LAB + "run.py",
        "if resumable and state.progress.step == self._kept:",
        "if False:",
        _SURVIVAL + "test_a_checkpoint_is_written_between_evaluations_and_changes_no_figure",
    ),
    Bug(
        _LAB + "run.py",
        "resumable and self._last_is_whole",
        "resumable",
        _SURVIVAL + "test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before",
    ),
    Bug(
        _LAB + "run.py",
        ">= self.config.save_every",
        "> 10 * self.config.save_every + 60",
        _SURVIVAL + "test_a_checkpoint_is_written_between_evaluations_and_changes_no_figure",
    ),
    Bug(
        _LAB + "seal.py",
        "return bool(mark) and content == above + _line(above)",
        "return bool(mark)",
        "test_run_folder.py",
    ),
    Bug(
        _LAB + "lock.py",
        "LOCK_EX | LOCK_NB)",
        "LOCK_NB)",
        _SURVIVAL + "test_a_second_process_on_a_run_is_refused_until_the_first_one_is_dead",
    ),
    Bug(_LAB + "metrics.py", "if at - made >= following:", "if False:", "test_metrics.py"),
    Bug(
        _LAB + "metrics.py",
        "            with contextlib.suppress(OSError):\n"
        "                os.ftruncate(self._file, self._bytes)\n",
        "",
        "test_metrics.py",
    ),
    Bug(
        _LAB + "identity.py",
        "        names.append(tokenizer.file)\n",
        "        pass\n",
        "test_sample.py",
    ),
    Bug(
        _LAB + "display.py",
        "                os.dup2(nowhere, self._stream.fileno())",
        "                pass",
        _SURVIVAL + "test_what_python_writes_when_it_exits_goes_nowhere_too",
    ),
    Bug(
        _LAB + "signals.py",
        "self.status = 128 + number",
        "self.status = 130",
        _SURVIVAL + "test_a_second_signal_ends_at_once_but_a_closed_terminal_says_so_twice",
    ),
    Bug(
        _LAB + "callbacks.py",
        "            self._save()\n            if not raised",
        "            if not raised",
        "test_trackers.py",
    ),
    Bug(
        _LAB + "sweep/study.py",
        "if lock.held and self.trials[running.number].state == TrialState.RUNNING:",
        "if not lock.held:",
        "test_sweep.py",
    ),
    Bug(_LAB + "edges.py", "end * d > 0 and end * d >= least", "end * d > 0", "test_sweep.py"),
    Bug(
        _LAB + "sweep/study.py",
        "wider = replace(now, low=min(now.low, value), high=max(now.high, value))",
        "wider = now",
        "test_sweep.py",
    ),
    Bug(_LAB + "trackers.py", '"allow" if begin.step else "never"', '"never"', "test_trackers.py"),
    Bug(
        _LAB + "pipeline.py",
        "stage.error(h, targets[turn], 1 / M)",
        "stage.error(h, targets[turn], 1.0)",
        "test_pipeline.py",
    ),
    Bug(
        _LAB + "pipeline.py",
        "distributed.all_reduce(square)",
        "distributed.broadcast(square, 0)",
        "test_pipeline.py",
    ),
    Bug(
        _LAB + "pipeline.py",
        "rule.learned or rule.period",
        "rule.learned",
        "test_pipeline.py",
    ),
]
