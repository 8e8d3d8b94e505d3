"""Record a step: a stage that notes the samples, and hooks that sketch what each module gives, sample by sample.

Sketches are of whole tensors of one sample, so they do not depend on the layout: tokens that a sequence group shares
are joined, packs are split, and a recomputation in the backward pass is not looked at. The processes' parts of the
global batch meet on the main process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltd.data import MicroBatch, StepInfo
from ltd.parallel.interface import flat, full_shape
from ltd.training.session import Session
from ltd.training.step import Stage
from ltd.training.trace import WIDTH, Entry, Kind, Sample, Trace, What, finish, sketch, sums
from ltd.training.work import Work

logger = logging.getLogger(__name__)

#: Name of the trained module itself in a trace.
MODEL = "model"


class Recorder:
    """A stage that does what another one does, and notes what passes.

    Args:
        session: The run.
        stage: What one step is.
        modules: Whether to sketch inputs, module outputs and gradients too; otherwise only losses are noted.
    """

    def __init__(self, session: Session, stage: Stage, *, modules: bool) -> None:
        self.name = stage.name
        self._session, self._stage, self._modules = session, stage, modules
        self._entries: list[Entry] = []
        self._losses: dict[int, float] = {}
        self._weights: list[Entry] = []
        self._gradients: list[Entry] = []
        self._completed: dict[str, int] = {}
        self._cut: _Cut | None = None
        self._calls: Counter[str] = Counter()

    def prepare(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Do as the stage does."""
        return self._stage.prepare(batch)

    def work(self) -> Work:
        """Count as the stage does."""
        return self._stage.work()

    def encoder_flops(self) -> float:
        """Count as the stage does."""
        return self._stage.encoder_flops()

    def heldout(self) -> dict[str, float]:
        """Evaluate as the stage does."""
        return self._stage.heldout()

    def begin(self, step: int) -> None:
        """Begin as the stage does."""
        self._stage.begin(step)

    def critic_terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Compute what the stage computes."""
        return self._stage.critic_terms(tensors)

    def end(self, *, applied: bool) -> None:
        """End as the stage does."""
        self._stage.end(applied=applied)

    def terms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute what the stage computes, and note it.

        Args:
            tensors: What ``prepare`` made, of one member of the sequence group.

        Returns:
            What the stage gave.
        """
        draws = tensors["draws"].tolist()
        self._cut, self._calls = _Cut(draws, self._session.layout.sequence) if self._modules else None, Counter()
        try:
            if self._cut is not None:
                self._note_prepared(tensors)
            values = self._stage.terms(tensors)
        finally:
            self._cut = None  # what is recomputed later is not noted
        if self._session.layout.sequence_rank == 0:
            self._losses |= dict(zip(draws, values["loss"].tolist(), strict=True))
        return values

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Sketch the weights and hook into the model for the length of a step; called by all processes."""
        model, restore = self._session.engine.module, contextlib.ExitStack()
        with restore:
            if self._modules:
                self._sketch_weights()
                restore.callback(model.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                for name, module in self._watched(model):
                    restore.callback(module.register_forward_hook(self._hook(name)).remove)
                    if "attend" in vars(module):
                        _replace(restore, module, "attend", self._attending(name, module))
                for name, note in (("shard_tokens", self._note_tokens), ("shard_lengths", self._note_lengths)):
                    if name in vars(model):
                        _replace(restore, model, name, _Noted(getattr(model, name), note))
            yield

    def collect_gradients(self) -> None:
        """Sketch the summed gradients; called by all processes after the last backward pass."""
        if not self._modules:
            return
        gradients = self._session.engine.gradients()
        if self._session.layout.is_main:
            for name in self._backward_order(list(gradients)):
                values = sketch(gradients[name].unsqueeze(0))[0].cpu()
                self._gradients.append(Entry("gradient", name, None, "whole", tuple(gradients[name].shape), values))

    def samples(self, micro_batches: Sequence[MicroBatch], info: StepInfo) -> list[Sample]:
        """List the samples of the global batch with their losses; called by all processes.

        Args:
            micro_batches: This process's part of the batch, as the guards left it.
            info: Step of the batch.

        Returns:
            The samples by draw, the same on all processes.
        """
        rows = {
            draw: (key, weight)
            for batch in micro_batches
            for draw, key, weight in zip(batch.draws, batch.keys, batch.weight.tolist(), strict=True)
        }
        gathered = self._session.layout.gather_objects((rows, self._losses))
        losses = {draw: loss for _, part in gathered for draw, loss in part.items()}
        loader = self._session.loader
        planned = loader.plan.step(info.step)
        entries = dict(zip(planned.draws, planned.entries, strict=True))
        return [
            Sample(draw, key, loader.source.shard_of(entries[draw]), weight, losses.get(draw, math.nan))
            for draw, (key, weight) in sorted((item for part, _ in gathered for item in part.items()))
        ]

    def trace(self, samples: Sequence[Sample], facts: dict[str, Any]) -> Trace | None:
        """Bring all processes' sketches together; called by all processes.

        Args:
            samples: What ``samples`` gave.
            facts: What the trace says of the run.

        Returns:
            The trace on the main process, None elsewhere.
        """
        values = torch.stack([e.values for e in self._entries]).cpu() if self._entries else None
        plain = [dataclasses.replace(e, values=torch.empty(0)) for e in self._entries]
        gathered = self._session.layout.gather_objects((plain, values))
        if not self._session.layout.is_main:
            return None
        found = [
            dataclasses.replace(entry, values=row)
            for part, rows in gathered
            if rows is not None
            for entry, row in zip(part, rows.unbind(), strict=True)
        ]
        # By tensor in the order of the first forward pass, each by draw.
        order: dict[tuple[What, str], int] = {}
        for entry in found:
            order.setdefault((entry.what, entry.name), len(order))
        found.sort(key=lambda e: (e.what, order[e.what, e.name], e.draw))  # "input" before "output"
        return Trace(facts, samples, [*self._weights, *found, *self._gradients])

    def _sketch_weights(self) -> None:
        """Sketch the master weights; each process adds the parts that it holds."""
        engine, layout = self._session.engine, self._session.layout
        shapes = {name: full_shape(p) for name, p in engine.module.named_parameters() if p.requires_grad}
        rows = {name: number for number, name in enumerate(shapes)}
        totals = torch.zeros(len(rows), WIDTH, dtype=torch.float64, device=layout.device)
        for shard in engine.master_shards():
            if shard.owner:
                part = sums(flat(shard.data).unsqueeze(0), shard.start, math.prod(shard.shape))
                totals[rows[shard.name]] += part[0].to(layout.device)
        sketches = finish(layout.sum_(totals)).cpu()
        self._weights = [Entry("weight", n, None, "whole", shapes[n], sketches[row]) for n, row in rows.items()]

    def _watched(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """List the modules to hook: not those inside compiled ones, whose graphs a hook would break."""
        compiled = tuple(f"{name}." for name in self._session.compiled.modules)
        return [
            (name, module) for name, module in model.named_modules() if not (compiled and name.startswith(compiled))
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._note_output(name or MODEL, output)

        return note

    def _attending(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        attend: Callable[..., Tensor] = vars(module)["attend"]

        def noted(*args: Any, **kwargs: Any) -> Tensor:
            out = attend(*args, **kwargs)
            self._note_output(f"{name}.attend", out)
            return out

        return noted

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Note what the model is given."""
        if self._cut is None:
            return
        names = list(inspect.signature(model.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self._cut.enter(given)
        for name, value in given.items():
            for suffix, tensor in _tensors(value):
                self._note("input", f"{MODEL}({name}{suffix})", tensor)

    def _note_tokens(self, x: Tensor) -> None:
        if self._cut is not None:
            self._cut.num_tokens = x.shape[1]

    def _note_lengths(self, lengths: tuple[int, ...]) -> None:
        if self._cut is not None:
            self._cut.lengths = lengths

    def _note_output(self, name: str, output: Any) -> None:
        if self._cut is None:
            return
        count = self._calls[name]
        self._calls[name] += 1
        self._completed.setdefault(name, len(self._completed))
        for suffix, value in _tensors(output):
            self._note("output", f"{name}{suffix}" + (f" (call {count + 1})" if count else ""), value)

    @torch.no_grad()
    def _note(self, what: What, name: str, value: Tensor | list[Tensor]) -> None:
        """Sketch a tensor sample by sample; the members of a sequence group join what they share."""
        layout, cut = self._session.layout, self._cut
        assert cut is not None
        joined = None
        if isinstance(value, Tensor) and what == "output" and cut.is_shared(value):
            joined = torch.cat(layout.gather_sequence(value.detach().contiguous()), 1)
        if layout.sequence_rank == 0:
            for kind, rows in cut.rows(value, joined):
                self._add(what, name, kind, rows)

    def _note_prepared(self, tensors: dict[str, Tensor]) -> None:
        if self._session.layout.sequence_rank != 0:
            return
        for name, tensor in tensors.items():
            if name in ("draws", "weight", "shapes") or name.endswith("_mask"):
                continue
            mask, shapes = tensors.get(f"{name}_mask"), tensors.get("shapes")
            if mask is not None:
                self._add("input", name, "text", [row[kept] for row, kept in zip(tensor, mask, strict=True)])
            elif shapes is not None and name == "latents":
                pieces = tensor.split(shapes.prod(1).tolist())
                self._add("input", name, "whole", [p.view(s) for p, s in zip(pieces, shapes.tolist(), strict=True)])
            else:
                self._add("input", name, "whole", tensor)

    def _add(self, what: What, name: str, kind: Kind, rows: Tensor | list[Tensor]) -> None:
        assert self._cut is not None
        parts = [sketch(rows)] if isinstance(rows, Tensor) else [sketch(row.unsqueeze(0)) for row in rows]
        for draw, row, values in zip(self._cut.draws, rows, torch.cat(parts).unbind(), strict=True):
            self._entries.append(Entry(what, name, draw, kind, tuple(row.shape), values))

    def _backward_order(self, names: list[str]) -> list[str]:
        """Sort parameters by when the backward pass reaches their modules: the last to be called comes first."""

        def place(number: int) -> tuple[int, int]:
            owner = names[number].rpartition(".")[0]
            while owner and owner not in self._completed:
                owner = owner.rpartition(".")[0]
            return self._completed.get(owner or MODEL, -1), number

        return [names[number] for number in sorted(range(len(names)), key=place, reverse=True)]


class _Cut:
    """How the tensors of one forward pass are cut into samples."""

    def __init__(self, draws: list[int], sequence: int) -> None:
        self.draws, self.sequence = draws, sequence
        #: Tokens of the whole sequence, and of each sample of a pack; None before the model cut them.
        self.num_tokens: int | None = None
        self.lengths: tuple[int, ...] | None = None
        self.packed = False
        self.text_mask: Tensor | None = None

    def enter(self, given: dict[str, Any]) -> None:
        """Look at what the model is given."""
        self.num_tokens = self.lengths = None
        self.packed = any(isinstance(value, list) for value in given.values())
        masks = [getattr(value, "text_mask", None) for value in given.values()]
        self.text_mask = next((mask for mask in masks if mask is not None), None)

    def has_tokens(self, x: Tensor) -> bool:
        """Say whether the tensor may hold this process's tokens on axis 1."""
        rows = 1 if self.packed else len(self.draws)
        if self.num_tokens is None or x.ndim < 2 or (self.packed and self.lengths is None):
            return False
        return tuple(x.shape[:2]) == (rows, -(-self.num_tokens // self.sequence))

    def is_shared(self, x: Tensor) -> bool:
        """Say whether the tensor may be a part of what the sequence group holds together; alike on all members."""
        return self.sequence > 1 and self.has_tokens(x)

    def rows(self, x: Tensor | list[Tensor], joined: Tensor | None) -> Iterator[tuple[Kind, Tensor | list[Tensor]]]:
        """Cut into samples in every way that the sizes allow.

        Args:
            x: Tensor, or one per sample.
            joined: The group's parts one behind another, where they may be parts.

        Yields:
            The way, and one tensor per sample.
        """
        if isinstance(x, list):
            yield "whole", x
            return
        tokens = joined if joined is not None else x if self.has_tokens(x) else None
        if tokens is not None:
            tokens = tokens[:, : self.num_tokens]
            yield "tokens", list(tokens[0].split(self.lengths or ())) if self.packed else tokens
        text = self._text(x)
        if text is not None:
            yield "text", text
        # Split already, unless the sizes fit by chance what every member holds whole.
        alone = tokens is None or joined is not None
        if alone and x.ndim and len(x) and len(x) % len(self.draws) == 0 and (text is None or not self.packed):
            yield "whole", x.reshape(len(self.draws), len(x) // len(self.draws), *x.shape[1:]).squeeze(1)

    def _text(self, x: Tensor) -> list[Tensor] | None:
        mask = self.text_mask
        if mask is None or x.ndim < 2:
            return None
        if not self.packed:
            fits = x.shape[:2] == mask.shape
            return [row[kept] for row, kept in zip(x, mask, strict=True)] if fits else None
        counts = [max(count, 1) for count in mask.sum(1).tolist()]
        return list(x[0].split(counts)) if tuple(x.shape[:2]) == (1, sum(counts)) else None


class _Noted:
    """A seam that is told what it was given."""

    def __init__(self, seam: Callable[..., Any], note: Callable[[Any], None]) -> None:
        self._seam, self._note = seam, note

    def __call__(self, x: Any) -> Any:
        self._note(x)
        return self._seam(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seam, name)


def _replace(restore: contextlib.ExitStack, module: nn.Module, name: str, value: Any) -> None:
    restore.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


def _tensors(value: Any, suffix: str = "") -> Iterator[tuple[str, Tensor | list[Tensor]]]:
    """Find the tensors in what a module takes or gives, and name them; a list is one tensor per sample."""
    if isinstance(value, Tensor | list):
        yield suffix, value
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{suffix}[{number}]")
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _tensors(getattr(value, item.name), f"{suffix}.{item.name}")
