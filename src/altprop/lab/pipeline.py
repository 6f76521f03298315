"""Layer-parallel direct feedback: a stage of blocks on each process, and no waiting for gradients.

Under direct feedback to blocks, a block learns from its input and the output's error alone. So
activations go forward from neighbour to neighbour, the last stage broadcasts the error, and every
stage makes its gradients by itself: nothing travels back.

Legend: `B` windows of a micro-batch, `T` tokens, `C` channels, `V` words; `k`, the error's width,
`V` at the logits and `C` at the head's input; `S` stages, `M` micro-batches of a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from altprop import AbstractBroadcast, ConfigError, convert, revert
from altprop.lab.building import averaged, drawn, make_optimiser
from altprop.lab.checkpoint import Checkpoint
from altprop.lab.guard import Guard, gradient_norm
from altprop.lab.ranks import Ranks
from altprop.lab.settings import TrainConfig
from altprop.lab.state import Batch, State
from altprop.lm.model import GPT, Block, cross_entropy, embed
from altprop.lm.text import Corpus

PER_STAGE = 4  # micro-batches for each stage: the last still computes for most of its time


class Outlet(nn.Linear):
    """Where the error enters a stage: it stands for the head, of which it has only the widths."""

    def __init__(self, width: int, at_input: bool) -> None:
        super().__init__(*(width, 0) if at_input else (0, width), bias=False)
        self.at_input = at_input
        empty = self.weight.detach()
        del self.weight
        self.register_buffer("weight", empty, persistent=False)  # no part of what is saved

    def reset_parameters(self) -> None:
        """Draw nothing: there is no weight."""

    def forward(self, h: Tensor) -> Tensor:
        """Return the tensor whose cotangent is the error, `(B, T, C) → (B, T, k)`."""
        return h if self.at_input else h.new_zeros(*h.shape[:-1], self.out_features)


class Stage(nn.Module):
    """Blocks of a GPT that follow one another, under the names that the whole model has for them.

    The first stage has the embeddings too, the last one norm and head. The feedback is drawn as
    that of the whole model. In evaluation all stages together are the whole model, and every
    process must make the same calls.

    **Arguments:** `model`, whole and not converted, whose parts are taken, not copied; `index` of
    `count` stages.
    """

    def __init__(
        self, model: GPT, rule: AbstractBroadcast, seed: int, index: int, count: int
    ) -> None:
        super().__init__()
        self.config, self.dropout = model.config, model.dropout
        self.index, self.first, self.last = index, index == 0, index == count - 1
        self.end = count - 1
        if self.first:
            self.tokens, self.positions = model.tokens, model.positions
        self.blocks = nn.Sequential()
        for number in placed(len(model.blocks), index, count):
            self.blocks.add_module(str(number), model.blocks[number])
        shape = model.config
        self.width = shape.d_model if rule.at_head_input else shape.vocabulary
        self.outlet = Outlet(self.width, rule.at_head_input)
        convert(self, {"blocks.*": rule}, output="outlet", seed=seed, batch_axis=0)
        if self.last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor, targets: Tensor | None = None) -> tuple[Any, Any]:
        """Return this stage's activations, `(B, T, C)`, and the place of the error, `(B, T, k)`.

        In evaluation return the whole model's logits, `(B, T, V)`, and nothing; if `targets` are
        given, nothing and the mean cross-entropy.

        **Arguments:** `x`, ids, `(B, T)`, or in training what the stage before has made of them.
        """
        if self.training:
            h = self.blocks(embed(cast(GPT, self), x) if self.first else x)
            return h, self.outlet(h)
        h = self.blocks(self._given(x))
        if targets is None:
            return self._answer(h, self._read_out, (*x.shape, self.config.vocabulary)), None
        return None, self._answer(h, lambda h: cross_entropy(self._read_out(h), targets), ())

    def extend(
        self, ids: Tensor, cache: tuple[int, Any] | None = None
    ) -> tuple[Tensor, tuple[int, Any]]:
        """Do as `GPT.extend`; the cache is of this stage's blocks."""
        length, kept = cache or (0, [None] * len(self.blocks))
        h, grown = self._given(ids, length), []
        for block, pair in zip(self.blocks, kept, strict=True):
            h, pair = cast(Block, block).extend(h, pair)
            grown.append(pair)
        shape = (len(ids), self.config.vocabulary)
        logits = self._answer(h, lambda h: self._read_out(h[:, -1]), shape)
        return logits, (length + ids.shape[1], grown)

    def _read_out(self, h: Tensor) -> Tensor:
        return self.head(self.norm(h))

    def _given(self, ids: Tensor, start: int = 0) -> Tensor:
        """Return what the blocks of this stage are given for ids, `(B, T, C)`."""
        if self.first:
            return embed(cast(GPT, self), ids, start)
        h = next(self.parameters()).new_empty(*ids.shape, self.config.d_model)
        distributed.recv(h, self.index - 1)
        return h

    def _answer(
        self, h: Tensor, read: Callable[[Tensor], Tensor], shape: tuple[int, ...]
    ) -> Tensor:
        """Return, in all processes, what the last stage reads from its activations."""
        if self.last:
            out = read(h).to(h)
        else:
            distributed.send(h.contiguous(), self.index + 1)
            out = h.new_empty(shape)
        distributed.broadcast(out, self.end)
        return out

    def error(self, h: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Return `share` of the loss, and its error, `(B, T, k)`; norm and head get gradients."""
        x = self.norm(h)
        at = x if self.outlet.at_input else self.head(x)
        if not at.requires_grad:  # all before it is frozen
            at.requires_grad_()
        at.retain_grad()
        logits = self.head(at) if self.outlet.at_input else at
        loss = share * cross_entropy(logits, targets)
        loss.backward()
        assert at.grad is not None
        return loss.detach(), at.grad


def placed(layers: int, index: int, count: int) -> range:
    """Return which blocks a stage has: as many as any other, or one more."""
    return range(index * layers // count, (index + 1) * layers // count)


@dataclass(frozen=True)
class Message:
    """A tensor that is sent, or on its way; `work` is none for what is here already."""

    tensor: Tensor
    work: Any = None

    def wait(self) -> Tensor:
        """Return the tensor once it has arrived, or is sent."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


class Pipeline:
    """What a stage does with a batch, beside the other processes of the group: a run's loss.

    A stage goes ahead of the errors by as many micro-batches as are on their way to the output and
    no more, so it keeps the activations of at most `S`.

    **Arguments:** `parts`, the micro-batches `M` of a batch.
    """

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.index, self.count = distributed.get_rank(), distributed.get_world_size()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Add a batch's gradient to the stage's, and return the loss, the same in every process.

        The loss is a leaf: its own backward pass has nothing left to do.
        """
        stage = cast(Stage, model)
        ids, targets = (tensor.chunk(self.parts) for tensor in batch)
        M = len(ids)  # of fewer windows there are fewer
        like = next(stage.parameters())
        loss = like.new_zeros(())
        arriving = deque(self._inputs(stage, ids, like))
        errors: deque[Message] = deque()
        waiting: deque[Tensor] = deque()  # the places of errors that have not come yet
        sending: list[Message] = []
        ahead = min(M, self.count - self.index)
        for turn in range(M + ahead - 1):
            if turn < M:
                if not stage.last:  # asked for before the last stage can have it
                    errors.append(self._broadcast(like.new_empty(*ids[0].shape, stage.width)))
                h, place = stage(arriving.popleft().wait())
                waiting.append(place)
                if stage.last:
                    share, e = stage.error(h, targets[turn], 1 / M)
                    loss += share
                    errors.append(self._broadcast(e))
                else:
                    sending.append(Message(h, distributed.isend(h, self.index + 1, tag=turn)))
            if turn >= ahead - 1:
                e, place = errors.popleft().wait(), waiting.popleft()
                if place.requires_grad:  # unless all its blocks are frozen
                    place.backward(e)
        for message in sending:
            message.wait()
        distributed.broadcast(loss, self.count - 1)
        return loss.requires_grad_()

    def _inputs(self, stage: Stage, ids: tuple[Tensor, ...], like: Tensor) -> list[Message]:
        """Ask for what the stage before sends, and return it as it will come."""
        if stage.first:
            return [Message(part) for part in ids]
        buffers = [like.new_empty(*part.shape, stage.config.d_model) for part in ids]
        return [
            Message(buffer, distributed.irecv(buffer, self.index - 1, tag=turn))
            for turn, buffer in enumerate(buffers)
        ]

    def _broadcast(self, error: Tensor) -> Message:
        return Message(error, distributed.broadcast(error, self.count - 1, async_op=True))


def whole_norm(stage: nn.Module) -> Tensor:
    """Return the norm of the whole model's gradient, of which each process has a part."""
    # a stage without a gradient has a zero of torch's default type
    square = gradient_norm(stage).to(next(stage.parameters())).square()
    distributed.all_reduce(square)
    return square.sqrt()


class StageState(State):
    """What a stage goes on from: its part of what one process would have, and the same progress."""

    def parameters(self) -> int:
        own: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(own, super().parameters())
        return sum(own)

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of all stages in the first process, and nothing in the others."""
        leads = distributed.get_rank() == 0
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.gather_object(tensors, found if leads else None)
        return {name: value for one in found if leads for name, value in one.items()}

    def restore(self, saved: Checkpoint, path: Path) -> None:
        """Take this stage's part back to a checkpoint of the whole model; see `State.restore`."""
        own, names = self.model.state_dict(), {name for name, _ in self.model.named_parameters()}
        moments = {k: v for k, v in saved.optimiser.items() if k.rpartition(".")[0] in names}
        model, training = (
            {name: value for name, value in group.items() if name in own}
            for group in (saved.model, saved.training)
        )
        super().restore(replace(saved, model=model, training=training, optimiser=moments), path)


def begin_stage(config: TrainConfig, corpus: Corpus, ranks: Ranks) -> tuple[State, Guard]:
    """Return what this process's stage starts from: its part of what one process would have.

    **Raises:** `ConfigError` for what cannot be run as a pipeline; as `build_model`.
    """
    config.check_training(len(corpus.tokenizer))
    model, batches = drawn(config, corpus)
    check(config, model, ranks.size)
    rule = cast(AbstractBroadcast, config.rule)
    stage = Stage(revert(cast(GPT, model)), rule, config.seed, ranks.rank, ranks.size)
    guard = Guard(config, torch.Generator().manual_seed(config.seed + 1), norm=whole_norm)
    optimiser, average = make_optimiser(stage, config), averaged(stage, config)
    loss = Pipeline(micro_batches(config, ranks.size))
    return StageState(stage, loss, optimiser, batches, guard.state, average), guard


def micro_batches(config: TrainConfig, count: int) -> int:
    """Return the micro-batches of a batch: what was said, or the most that divide it evenly."""
    if config.microbatches is not None:
        return config.microbatches
    most = min(config.batch, PER_STAGE * count)
    return next(n for n in range(most, 0, -1) if config.batch % n == 0)


def check(config: TrainConfig, model: nn.Module, count: int) -> None:
    """Refuse what cannot run as `count` stages with the result of one process.

    **Arguments:** `model`, whole and converted.

    **Raises:** `ConfigError`.
    """
    if not isinstance(model, GPT) or not hears_the_output_alone(config.rule, model):
        raise ConfigError(
            f"parallel pipeline cannot train by {config.rule or config.method}: there a block's "
            "gradient needs more than its input and the error at the output; write --model gpt "
            "--rule \"DirectFeedback(granularity='block')\", or granularity='sublayer'"
        )
    others = {"accumulate": 1, "dtype": "float32", "compile": False, "checkpointing": False}
    if changed := [name for name, plain in others.items() if getattr(config, name) != plain]:
        raise ConfigError(
            f"parallel pipeline has no {', '.join(changed)}: leave that out (--microbatches says "
            "in how many parts a batch goes through it)"
        )
    if config.device != "cpu" and (config.device != "auto" or torch.cuda.is_available()):
        raise ConfigError(
            f"parallel pipeline computes on the CPU, not {config.device}: write --device cpu"
        )
    if len(model.blocks) < count:
        raise ConfigError(
            f"parallel pipeline has {count} processes for {len(model.blocks)} blocks: write "
            f"--layers {count}, or more, or start fewer processes"
        )
    if config.tie_head:
        raise ConfigError(
            "parallel pipeline has the embedding in the first process and the head in the last, so "
            "they cannot be one: leave out --tie_head"
        )
    if config.dropout:
        raise ConfigError(
            "parallel pipeline cannot draw dropout as one process does: leave out --dropout"
        )


def hears_the_output_alone(rule: object, model: GPT) -> bool:
    """Say whether every block of a converted model learns from the error at the output alone.

    That is so if nothing is measured of the model for it, no pass is one of exact backprop, and no
    block's output leads back into the block.
    """
    if not isinstance(rule, AbstractBroadcast) or rule.learned or rule.period:
        return False
    outputs: list[Tensor] = []
    keep = lambda block, inputs, output: outputs.append(output)  # noqa: E731
    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    with torch.enable_grad():
        model(torch.zeros(1, 1, dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    return not any(output.requires_grad for output in outputs)
